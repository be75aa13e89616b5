"GKD: its formulas, its properties, where gradients go, all five stages, bad input."
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medkd.core import Tapped, Taps, freeze, tap_shapes
from medkd.data.base import Splits, collate
from medkd.data.views import Views, tiles, view_batches, with_views
from medkd.files import read_json
from medkd.losses.gkd import (ACT, GKD, MSAN, PSAE, Alignment, LatentNet, Reconstruction, alignment_scores, annotation,
                              bottleneck, cross, embed, fsd, inter_graph, intra_graph, mask_dice, silhouette, warmup)
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, Run, fit
from medkd.trainers.checkpoint import read_checkpoint
from medkd.trainers.objective import Objective, Step, Teacher

ALL = frozenset(GKD.names)
SIZE, DIM = 64, 16


class Rings:
    "Bright rings on a soft ground; whole images are larger than a training sample."
    def __init__(self, n, seed, size=SIZE, classes=2):
        self.cases = self.patients = tuple(f"{seed}-{i}" for i in range(n))
        self.seed, self.size, self.classes = seed, size, classes

    def __len__(self): return len(self.cases)

    def sample(self, index, rng):
        y, x = np.mgrid[-1:1:self.size * 1j, -1:1:self.size * 1j]
        radius = np.hypot(y - rng.uniform(-.3, .3), x)
        label = sum((abs(radius - .25 * k) < .09) * k for k in range(1, self.classes))
        image = .3 + .1 * x + .3 * label / label.max() + .03 * rng.standard_normal(y.shape)
        return dict(image=torch.from_numpy(np.clip(image, 0, 1).astype(np.float32))[None],
                    label=torch.from_numpy(label).long(), case=self.cases[index])

    def __getitem__(self, index): return self.sample(index, np.random.default_rng([self.seed, index]))


def rings(classes=2):
    return Splits("rings", Rings(8, 0, SIZE, classes), Rings(2, 1, 150, classes), Rings(2, 2, 150, classes),
                  ("ground", *"abc"[:classes - 1]), f"rings {classes}", patch=(SIZE, SIZE))


teacher_net = partial(build, "fanet", 1, 2, width=.125)
student_net = partial(build, "mobile_unet", 1, 2, width=.25)


def msan_of(net, size=SIZE, **options):
    _, channels, *grid = tap_shapes(net, (1, 1, size, size), ["bottleneck"])["bottleneck"]
    return MSAN(channels, grid, DIM, **options)


def parts(views=4, student=student_net, seed=0, batch=None):
    "Student, teacher, term and their taps on one batch of two images with views."
    torch.manual_seed(seed)
    networks = student(), freeze(teacher_net())
    term = GKD(msan_of(networks[1]), msan_of(networks[0]))
    batch = batch or collate([Views(Rings(2, 0), views).sample(i, np.random.default_rng(i)) for i in range(2)])
    shown = Teacher(networks[1], GKD.needs[1]).taps(batch)
    return *networks, term, Tapped(networks[0], GKD.needs[0])(batch["image"]), shown, batch


# formulas
def pins(name):
    folder = Path(__file__).parent/"pins"
    return {key: torch.from_numpy(x) for key, x in np.load(folder/f"gkd_{name}.npz", allow_pickle=False).items() if x.dtype.kind == "f"}


def test_pinned_graphs():
    pin = pins("dcgd")
    z = pin["z_student"].double(), pin["z_teacher"].double()
    assert intra_graph(*z).item() == pytest.approx(pin["loss_intra"].item(), rel=1e-12)
    assert inter_graph(*z).item() == pytest.approx(pin["loss_inter"].item(), rel=1e-12)


def test_pinned_cross():
    pin = {key: x.double() for key, x in pins("dicd").items()}
    st = cross(pin["student_vector_via_teacher_decoder"], pin["teacher_logits"])
    ts = cross(pin["teacher_vector_via_student_decoder"], pin["teacher_logits"])
    assert [st.item(), ts.item()] == pytest.approx([pin["kl_st"].item(), pin["kl_ts"].item()], rel=1e-12)
    assert (st + ts).item() == pytest.approx(pin["loss"].item(), rel=1e-12)


def test_pinned_fsd():
    pin = pins("fsd")
    assert fsd(pin["a"], pin["b"]).item() == pytest.approx(pin["fsd"].item(), rel=1e-10)
    assert fsd(pin["b"], pin["a"]).item() == pytest.approx(pin["fsd"].item(), rel=1e-10)
    assert abs(fsd(pin["a"], pin["a"])) < 1e-12


def test_fsd_of_few_vectors_is_scipys():
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 40)), rng.normal(.5, 2, size=(100, 40))
    s, t = np.cov(a.T) + 1e-6 * np.eye(40), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert fsd(a, b).item() == pytest.approx(expected, rel=1e-4)


# properties
OPTIONS = [dict(), dict(edge="l2"), dict(edge="dot"), dict(distance="kl")]


GRAPHS = [(graph, options) for graph in (intra_graph, inter_graph) for options in OPTIONS] + [(inter_graph, dict(scope="batch"))]


@pytest.mark.parametrize("graph, options", GRAPHS)
def test_graph_properties(graph, options):
    torch.manual_seed(0)
    z_s, z_t = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    value = graph(z_s, z_t, **options)
    assert value > 0 and graph(z_t, z_t, **options).abs() < 1e-12
    turn, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    order = [0, 4, 2, 1, 3]
    same = [graph(z_s @ turn, z_t, **options), graph(z_s[:, order], z_t[:, order], **options)]
    if options.get("edge", "cos") == "cos":
        scale = torch.rand(3, 5, 1, dtype=torch.float64) + .1
        same += [graph(z_s * scale, z_t, **options), graph(z_s, 7 * z_t, **options)]
    assert [v.item() for v in same] == pytest.approx([value.item()] * len(same), rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_view_has_no_inter_graph(options):
    z = torch.randn(3, 2, 8, requires_grad=True)
    loss = inter_graph(z, torch.randn(3, 2, 8), **options)
    loss.backward()
    assert loss.item() == 0 and not z.grad.any()
    assert torch.isfinite(intra_graph(z, torch.randn(3, 2, 8), **options))


def test_inter_graph_of_the_batch_joins_images():
    z_s, z_t = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    nodes = [z[:, 1:].reshape(4, 8) for z in (z_s, z_t)]
    cos = [nn.functional.cosine_similarity(n[:, None], n[None], dim=-1) for n in nodes]
    pairs = torch.triu_indices(4, 4, 1)
    expected = (cos[0] - cos[1])[pairs[0], pairs[1]].square().mean()
    torch.testing.assert_close(inter_graph(z_s, z_t, scope="batch"), expected)


@pytest.mark.parametrize("kwargs, named", [(dict(edge="cosine"), "cosine"), (dict(distance="l1"), "l1"),
                                           (dict(scope="all"), "all")])
def test_unknown_option(kwargs, named):
    z = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=named): inter_graph(z, z, **kwargs)


@pytest.mark.parametrize("size", [(4, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("channels", (16, 40))
@pytest.mark.parametrize("standardise", (False, True))
def test_msan_keeps_the_shape(size, channels, standardise):
    msan, feature = MSAN(channels, size, 16, standardise), torch.randn(3, channels, *size)
    vector = msan.encode(feature)
    assert vector.shape == (3, 16) and msan.header(vector).shape == msan(feature).shape == feature.shape
    projections = [m for m in msan.modules() if isinstance(m, nn.Conv1d)]
    assert len(projections) == (0 if channels == 16 else 2)


def test_psae_of_several_classes():
    psae = PSAE(LatentNet(3, .125), (32, 32), DIM)
    mask = annotation(dict(label=torch.randint(0, 4, (2, 32, 32))), num_classes=4)
    assert psae.vector(mask).shape == (2, DIM) and psae(mask).shape == mask.shape == (2, 3, 32, 32)


# where gradients go
def reached(loss, net):
    "{encoder, decoder} as far as the loss has a gradient there."
    names, params = zip(*net.named_parameters())
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    hit = {name.partition(".")[0] for name, g in zip(names, grads) if g is not None and g.abs().max() > 0}
    return {"encoder" if name.startswith(("enc", "bottleneck")) else "decoder" for name in hit}


@pytest.mark.parametrize("student, through_skips", [
    (student_net, {"encoder"}), (partial(build, "enet"), set()), (partial(build, "erfnet", width=.25), set())])
def test_gradient_table(student, through_skips):
    student, teacher, term, taps, shown, batch = parts(student=student)
    term.train()
    torch.manual_seed(1) # dropout in the decoder
    losses = term(taps, shown, batch, ALL)
    torch.manual_seed(1)
    order = torch.tensor([0, 5])
    st, ts = term.exchanged(taps, shown, term.san.net.encode(taps["bottleneck"]),
                            term.tan.net.encode(shown["bottleneck"]), order)
    torch.testing.assert_close(st + ts, losses["cross"])
    table = {name: reached(loss, student) for name, loss in dict(losses, st=st, ts=ts).items()}
    assert table == dict(intra={"encoder"}, inter={"encoder"}, st={"encoder"}, ts={"decoder"} | through_skips,
                         cross={"encoder", "decoder"})
    sum(losses.values()).backward()
    for frozen in (teacher, term.tan.net, term.san.net):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
        assert not any(m.training for m in frozen.modules())


def test_the_target_of_alignment_gets_no_gradient():
    teacher = freeze(teacher_net())
    psae, msan = PSAE(LatentNet(1, .125), (SIZE, SIZE), DIM), msan_of(teacher)
    term, batch = ACT(psae), collate([Rings(2, 0)[i] for i in range(2)])
    shown = Teacher(teacher, ACT.needs[1]).taps(batch)
    losses = term(Tapped(msan, ACT.needs[0])(bottleneck(batch, shown)), shown, batch, frozenset(ACT.names))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in msan.parameters())
    for frozen in (teacher, term.psae.net): assert all(p.grad is None for p in frozen.parameters())
    assert set(term(Tapped(msan, ["encoder"])(shown["bottleneck"]), shown, batch, {"act_rec"})) == {"act_rec"}


def test_nothing_is_encoded_twice_and_what_is_off_costs_nothing():
    student, teacher, term, *_, batch = parts()
    objective, shown = Objective(student, [term]), Teacher(teacher, GKD.needs[1])
    calls = []
    for name, net in dict(student=student, teacher=teacher).items():
        for part in ("encode", "decode"):
            def count(x, original=getattr(net, part), what=f"{name} {part}"):
                calls.append((what, len(x["bottleneck"]) if isinstance(x, dict) else len(x)))
                return original(x)
            setattr(net, part, count)
    def run(active):
        calls.clear()
        losses, _ = objective(Step(batch["image"], shown.taps(batch), batch, frozenset(active)))
        return losses
    own = [("student decode", 10), ("student encode", 10), ("teacher decode", 10), ("teacher encode", 10)]
    assert set(run(["intra", "inter"])) == {"intra", "inter"} and sorted(calls) == own
    assert set(run(["cross"])) == {"cross"}
    assert sorted(calls) == sorted(own + [("student decode", 2), ("teacher decode", 2)])


def test_order_in_the_batch_does_not_matter():
    student, _, term, taps, shown, batch = parts()
    student.eval()
    values = term(taps, shown, batch, ALL)
    order = torch.randperm(10)
    shuffle = lambda t: Taps({n: x[order] for n, x in t.items()}, {n: x[order] for n, x in t.features.items()}, t._decoder)
    mixed = term(shuffle(taps), shuffle(shown), {k: batch[k][order] for k in ("view", "source")}, {"intra", "inter"})
    for name, value in mixed.items(): torch.testing.assert_close(value, values[name])


# bad input
def test_bottleneck_of_another_size():
    student, teacher, term, taps, shown, batch = parts()
    wrong = GKD(term.tan.net, msan_of(student, 128))
    with pytest.raises(ValueError, match=r"built for the student's bottleneck of \(320, 4, 4\).* given \(320, 2, 2\)"):
        wrong.build(*({n: tuple(t.shape) for n, t in x.items()} for x in (taps, shown)))


def test_vectors_of_another_length():
    student, teacher, term, taps, shown, batch = parts()
    _, channels, *grid = taps["bottleneck"].shape
    other = GKD(term.tan.net, MSAN(channels, grid, DIM + 1))
    assert set(other(taps, shown, batch, {"intra", "inter"})) == {"intra", "inter"}
    with pytest.raises(ValueError, match=r"vector of \(16,\).* given \(17,\)"): other(taps, shown, batch, ALL)


def test_network_without_halves():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.bottleneck, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(4, 2, 2, 2)
        def forward(self, x): return self.head(self.bottleneck(x))
    *_, term, _, shown, batch = parts()
    taps = Tapped(Plain(), GKD.needs[0])(batch["image"])
    own = GKD(term.tan.net, MSAN(4, (32, 32), DIM))
    with pytest.raises(TypeError, match="without encode and decode"): own(taps, shown, batch, ALL)
    with pytest.raises(KeyError, match="bottleneck"): Tapped(nn.Sequential(nn.Conv2d(1, 2, 1)), GKD.needs[0])


def test_one_view_trains_without_the_inter_graph():
    *_, term, taps, shown, batch = parts(views=1)
    losses = term(taps, shown, batch, ALL)
    assert losses["inter"].item() == 0 and losses["intra"] > 0 and losses["cross"] > 0


@pytest.mark.parametrize("change, message", [
    (dict(view=torch.arange(10) % 5 + 1), "needs one anchor"), (dict(view=torch.zeros(10)), "needs one anchor"),
    (dict(source=torch.tensor([0] * 4 + [1] * 6)), "different numbers"), (dict(view=None), "with_views")])
def test_batches_that_gkd_cannot_read(change, message):
    *_, term, taps, shown, batch = parts()
    batch = {k: v for k, v in (batch | change).items() if v is not None}
    if message.startswith("different"): batch["view"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=message): term(taps, shown, batch, ALL)


def test_images_smaller_than_a_tile():
    small = collate([Rings(1, 0, 32)[0]])
    with pytest.raises(ValueError, match=r"0-0 is \(32, 32\), smaller than a tile of \(64, 64\)"):
        next(tiles([small], (SIZE, SIZE)))


# views
def test_views_repeat_and_draw_from_nothing_else():
    views = Views(Rings(2, 0))
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (views.sample(0, np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in ("image", "label", "view"))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert not torch.equal(one["image"], views.sample(0, np.random.default_rng(6))["image"])
    assert all((one["label"][k] == 1).any() for k in range(5)) and one["label"].unique().tolist() == [0, 1]


def test_supervised_views_are_all_anchors():
    batch = collate([Views(Rings(2, 0), supervised=True)[0]])
    logits = torch.randn(5, 2, SIZE, SIZE)
    seen = {}
    Seg(lambda logits, label: seen.setdefault("n", torch.tensor(float(len(logits)))))(Taps(dict(out=logits)), Taps(), batch, {"seg"})
    assert seen["n"] == 5


# all five stages
BASE = Recipe(data=rings(), student=student_net, terms=(Seg,), weights=dict(seg=1), steps=2, batch_size=4,
              precision="fp32", lr=1e-3)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    "name -> run, as a paper notebook makes them."
    folder, runs = tmp_path_factory.mktemp("gkd"), {}
    train = lambda name, **what: runs.setdefault(name, fit(replace(BASE, **what), folder/name))
    train("teacher", student=teacher_net)
    train("student")
    train("latent", student=partial(LatentNet, 1, .125), terms=(Reconstruction,), weights=dict(reconstruction=1),
          student_input=annotation, validate=mask_dice)
    train("psae", student=partial(PSAE, runs["latent"], (SIZE, SIZE), DIM), terms=(Alignment,),
          weights=dict(psae_rec=1, psae_out=1), student_input=annotation, validate=mask_dice)
    for name, model, make in (("tan", "teacher", teacher_net), ("san", "student", student_net)):
        _, channels, *grid = tap_shapes(make(), (1, 1, SIZE, SIZE), ["bottleneck"])["bottleneck"]
        train(name, student=partial(MSAN, channels, tuple(grid), DIM), teacher=runs[model], student_input=bottleneck,
              terms=(partial(ACT, runs["psae"]),), weights=dict(act_rec=1, act_reg=1, act_seg=1), validate=alignment_scores)
    train("gkd", data=with_views(BASE.data), student=runs["student"], teacher=runs["teacher"], steps=3,
          terms=(Seg, partial(GKD, runs["tan"], runs["san"])),
          weights=dict(seg=1) | {name: warmup(1, epochs=1.5, share=.5) for name in GKD.names})
    return runs


def test_stages_train_what_they_are_to_train(stages):
    for name, first in dict(latent="dice", psae="dice", tan="dice", san="dice", gkd="dice").items():
        run = stages[name]
        assert run.complete and next(iter(run.metrics("val")[-1]["scores"])) == first
        assert not read_json(run.path/"wiring.json").get("unreached") or name == "latent"
    scores = stages["tan"].metrics("val")[-1]["scores"]
    assert set(scores) == {"dice", "own", "kept"} and all(map(math.isfinite, scores.values()))
    assert all(torch.equal(a, b) for a, b in zip(stages["psae"].network().latent.parameters(),
                                                 stages["latent"].network().parameters()))


def test_gkd_starts_from_the_student_and_warms_up(stages):
    rows = stages["gkd"].metrics("train")
    assert [row["weights"]["intra"] for row in rows] == pytest.approx([0, 2 / 3, 1])
    assert set(rows[0]["losses"]) == {"seg"} and set(rows[1]["losses"]) == {"seg", *GKD.names}
    wiring = read_json(stages["gkd"].path/"wiring.json")
    assert all(wiring[name]["gradient"] > 0 for name in GKD.names)


def test_frozen_networks_are_in_no_checkpoint(stages):
    state = read_checkpoint(stages["gkd"].path/"last.pt")
    names = [name for part in state.values() if isinstance(part, dict) for name in part]
    assert any("student.net.enc1" in name for name in names)
    assert not any("tan" in name or "san" in name for name in names)


def test_runs_are_opened_again_from_their_folders(stages):
    psae = Run(stages["psae"].path).network()
    assert psae.vector(torch.zeros(1, 1, SIZE, SIZE)).shape == (1, DIM)
    assert Run(stages["tan"].path).network().dim == DIM
    recipe = replace(BASE, data=with_views(BASE.data), student=stages["student"], teacher=stages["teacher"], steps=3,
                     terms=(Seg, partial(GKD, Run(stages["tan"].path), Run(stages["san"].path))),
                     weights=dict(seg=1) | {name: warmup(1, epochs=1.5, share=.5) for name in GKD.names})
    assert fit(recipe, stages["gkd"].path.parent/"gkd").path == stages["gkd"].path


def test_vectors_to_look_at(stages):
    batches = list(view_batches(Views(Rings(4, 3)), images=6))
    vectors, views = embed(stages["gkd"], stages["san"], batches)
    assert vectors.shape == (30, DIM) and views.tolist() == [0, 1, 2, 3, 4] * 6
    value, low, high, n = silhouette(vectors, views, permutations=20)
    assert low < high and -1 <= value <= 1 and n == 30
    targets, _ = embed(stages["gkd"], stages["san"], tiles([collate([Rings(1, 4, 150)[0]])], (SIZE, SIZE)))
    assert targets.shape == (4, DIM) and fsd(vectors[views == 0], targets) > 0


def test_an_msan_of_another_training_size_is_refused_before_the_first_step(stages, tmp_path):
    small = replace(rings(), train=Rings(8, 0, 32), patch=(32, 32))
    recipe = replace(BASE, data=with_views(small), student=stages["student"], teacher=stages["teacher"],
                     terms=(Seg, partial(GKD, stages["tan"], stages["san"])), weights=dict(seg=1, intra=1, inter=1, cross=1))
    with pytest.raises(ValueError, match=r"bottleneck of \(320, 2, 2\).* given \(320, 1, 1\)"): fit(recipe, tmp_path/"x")


def test_three_classes_and_bf16(tmp_path):
    data = replace(rings(3), val=Rings(2, 1, 96, 3)) # two tiles along each side
    base = replace(BASE, data=data, student=partial(build, "enet", 1, 3), precision="bf16", steps=1)
    teacher, student = (fit(r, tmp_path/n) for n, r in dict(
        t=replace(base, student=partial(build, "fanet", 1, 3, width=.125)), s=base).items())
    tan, san = (msan_of(run.network()) for run in (teacher, student))
    run = fit(replace(base, data=with_views(data), student=student, teacher=teacher, terms=(Seg, partial(GKD, tan, san)),
                      weights=dict(seg=1, intra=1, inter=1, cross=1)), tmp_path/"gkd")
    assert all(math.isfinite(v) for row in run.metrics("train") for v in row["losses"].values())


def test_cross_predictions_leave_the_running_statistics_to_the_own_passes():
    student, _, term, _, shown, batch = parts()
    def statistics(with_cross):
        torch.manual_seed(0)
        net = student_net()
        taps = Tapped(net, GKD.needs[0])(batch["image"])
        if with_cross: term(taps, shown, batch, {"cross"})["cross"].backward()
        return [b.clone() for b in net.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(statistics(False), statistics(True)))


def test_the_benchmark_measures_the_step(monkeypatch):
    import importlib
    import sys
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]/"benchmarks"))
    for name in ("common", "gkd"): monkeypatch.delitem(sys.modules, name, raising=False)
    bench = importlib.import_module("gkd")
    made = bench.setting(2, 64, .125, .25)
    calls = dict(floor=bench.floor(*made), step=bench.distilled(*made))
    for call in calls.values(): call()
    for name in ("common", "gkd"): sys.modules.pop(name)
    assert sorted({x.shape[0] for x in made[2].values() if torch.is_tensor(x)}) == [10]
