"Graph Flow, CoCo DistillNet and the comparators SKD, FSP, FT, VID: pins, properties, all stages, two processes, bad input."
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import toy
import torch
import torch.nn.functional as F
from torch import nn

from medkd.core import Taps, tap_shapes
from medkd.files import read_json
from medkd.losses.fsp import FSP, fsp
from medkd.losses.ft import FT, ft
from medkd.losses.graph_flow import (CoCo, GraphFlow, Paraphrase, Paraphraser, coco, graph_flow, paraphrase_scores,
                                     read_tap, salience, stepped_poly, variation, windows)
from medkd.losses.logits import KD
from medkd.losses.skd import SKD, Discriminator, Holistic, SelfAttention, gradient_penalty, pairwise, pixelwise
from medkd.losses.task import Seg
from medkd.losses.vid import VID, vid
from medkd.models.zoo import build
from medkd.trainers import Adversary, Recipe, fit, poly
from medkd.trainers.checkpoint import read_checkpoint

PINS = Path(__file__).parent/"pins"


def pin(name):
    "Arrays of one pin: this project's own numbers for the formulas of its notebook, no reference of the authors."
    arrays = {key: torch.from_numpy(np.asarray(x)) for key, x in np.load(PINS/f"{name}.npz", allow_pickle=False).items()}
    pairs = [[arrays[f"{who}{i}"].double() for i in (1, 2)] for who in "ST"]
    return arrays, *pairs


def maps(ndim=2, channels=4, size=7, seed=0):
    "A pair of features of the student, and one of the teacher."
    torch.manual_seed(seed)
    make = lambda n: torch.randn(2, channels, *[n] * ndim, dtype=torch.float64)
    return [make(size), make(size + 1)], [make(size), make(size - 1)]


# formulas
@pytest.mark.parametrize("name", ["graphflow_k3", "graphflow_k9"])
def test_pinned_graph_flow(name):
    arrays, student, teacher = pin(name)
    k = int(arrays["patch"])
    vertex, edge = graph_flow(student, teacher, k)
    expected = [arrays["loss_vertices"].item(), arrays["loss_edges"].item()]
    assert [vertex.item(), edge.item()] == pytest.approx(expected, rel=1e-12)
    assert (1e-5 * vertex + 1e-9 * edge).item() == pytest.approx(arrays["weighted"].item(), rel=1e-12)
    for pair, who in ((student, "student"), (teacher, "teacher")):
        for found, part in zip(variation(*pair, k), "VE"):
            torch.testing.assert_close(found, arrays[f"d{part}_{who}"], rtol=1e-12, atol=1e-12)
    for pair, i in zip(student, (1, 2)):
        flat, width = pair.flatten(2).argmax(2), pair.shape[3]
        assert torch.equal(torch.stack([flat // width, flat % width], -1), arrays[f"loc_S{i}"])


def test_pinned_coco():
    arrays, student, teacher = pin("coco_cross")
    assert coco(student, teacher).item() == pytest.approx(arrays["loss"].item(), rel=1e-12)


def test_float32_is_as_good():
    arrays, student, teacher = pin("graphflow_k9")
    found = graph_flow([f.float() for f in student], [f.float() for f in teacher], 9)
    assert [x.item() for x in found] == pytest.approx([arrays[f"loss_{n}"].item() for n in ("vertices", "edges")], rel=1e-5)


# properties of Graph Flow (the list of the specification, B.8)
OPTIONS = [dict(), dict(k=9), dict(edges="cosine"), dict(vertices="scalar")]


def values(student, teacher, **options): return torch.stack(graph_flow(student, teacher, **options))


@pytest.mark.parametrize("ndim", (2, 3))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_flow_properties(options, ndim):
    student, teacher = maps(ndim)
    value = values(student, teacher, **options)
    assert (value > 0).all() and values(teacher, teacher, **options).eq(0).all()
    order = [2, 0, 3, 1]
    permuted = values(*([f[:, order] for f in pair] for pair in (student, teacher)), **options)
    swapped = values(student[::-1], teacher[::-1], **options)
    twice = values(*([torch.cat([f, f]) for f in pair] for pair in (student, teacher)), **options)
    for other in (permuted, swapped, twice): torch.testing.assert_close(other, value, rtol=1e-9, atol=0)
    scaled = values(*([3 * f for f in pair] for pair in (student, teacher)), **options)
    power = [0, 0] if "edges" in options else [4, 4] if "vertices" in options else [2, 4]
    torch.testing.assert_close(scaled, value * 3. ** torch.tensor(power), rtol=1e-9, atol=0)


@pytest.mark.parametrize("k", (1, 3, 5))
def test_vertices_do_not_depend_on_the_place(k):
    feature = torch.zeros(1, 2, 16, 16)
    feature[..., 5:10, 4:9] = torch.randn(1, 2, 5, 5).abs() * torch.tensor([[1., 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 2, 9, 2, 1],
                                                                            [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]).add(.1)
    feature[..., 7, 6] = 100
    shifted = feature.roll((3, -1), (2, 3))
    assert torch.equal(salience(feature, k), salience(shifted, k))


@pytest.mark.parametrize("ndim", (2, 3))
def test_a_shift_leaves_both_losses(ndim):
    student, teacher = maps(ndim, size=5)
    padded, axes = [[F.pad(f, [4] * 2 * ndim) for f in pair] for pair in (student, teacher)], tuple(range(2, 2 + ndim))
    moved = [padded[0][0].roll((2, -1, 1)[:ndim], axes), padded[0][1]] # patches stay inside
    torch.testing.assert_close(values(moved, padded[1]), values(*padded), rtol=0, atol=0)


def test_equal_taps_after_the_paraphrasers():
    held = [Paraphraser(6, 4) for _ in range(2)]
    teacher = Taps(dict(encoder=torch.randn(2, 6, 8, 8), decoder=torch.randn(2, 6, 8, 8)))
    student = Taps({tap: one.encode(teacher[tap]) for one, tap in zip(held, teacher)})
    for term in (GraphFlow(held, k=5), FSP(held), CoCo(held)):
        assert all(loss == 0 for loss in term(student, teacher, {}, frozenset(term.names)).values())


@pytest.mark.parametrize("ndim", (2, 3))
def test_gradient_stays_inside_the_windows(ndim):
    student, teacher = maps(ndim)
    for f in student + teacher: f.requires_grad_()
    sum(graph_flow(student, teacher, 3)).backward()
    assert all(f.grad is None for f in teacher)
    for f in student:
        place, inside = windows(f, 3)
        allowed = torch.zeros(f.flatten(2).shape).scatter_add_(2, place, inside.float()).bool()
        hit = f.grad.flatten(2) != 0
        assert hit.any() and not (hit & ~allowed).any() and hit.sum(2).max() <= 3 ** ndim


def test_maxima_at_the_border_and_ties():
    feature = torch.zeros(1, 4, 4, 5)
    for channel, (y, x) in enumerate([(0, 0), (3, 4), (0, 4), (2, 0)]): feature[0, channel, y, x] = 1.
    patches = salience(feature, 3)
    assert patches.sum(2).eq(1).all() and patches[..., 4].eq(1).all()
    flat = torch.tensor([[[[0., 2, 2], [2, 1, 3], [3, 0, 0]]]])
    assert salience(flat, 1).item() == 3 and windows(flat, 1)[0].item() == 5 # the first of two, row by row


def test_a_patch_may_exceed_the_map():
    student, teacher = maps(size=4)
    assert salience(student[0], 11).shape == (2, 4, 121)
    patch = salience(student[0], 11).sort(2).values
    assert torch.equal(patch[..., :], torch.cat([student[0].flatten(2), torch.zeros(2, 4, 121 - 16)], 2).sort(2).values)
    assert torch.isfinite(values(student, teacher, k=11)).all()


def test_channels_without_a_paraphraser():
    student, teacher = maps()
    wide = [torch.cat([f, f], 1) for f in teacher]
    with pytest.raises(ValueError, match=r"student has 4 channels, the teacher 8.* Paraphraser\(8, 4\)"): graph_flow(student, wide)


def test_coco_takes_other_channels_and_sizes():
    student, teacher = maps()
    teacher = [torch.cat([f, f.flip(1)], 1) for f in teacher]
    for f in student + teacher: f.requires_grad_()
    loss = coco(student, teacher)
    loss.backward()
    assert loss > 0 and all(f.grad.abs().max() > 0 for f in student) and all(f.grad is None for f in teacher)
    torch.testing.assert_close(coco([2 * student[0], student[1]], [5 * f for f in teacher]), loss)


def test_schedule_of_the_paper():
    rates = [3e-3 * stepped_poly(e, 200) for e in (0, 49, 51, 101, 151)]
    expected = [3e-3 * f * (1 - e / 200) ** .9 for f, e in zip((1, 1, .1, .01, .001), (0, 49, 51, 101, 151))]
    assert rates == pytest.approx(expected)


# taps
@pytest.mark.parametrize("name, channels", [("fanet", 256), ("mobile_unet", 24), ("enet", 64), ("erfnet", 64)])
def test_published_taps_need_no_resizing(name, channels):
    with torch.device("meta"): net = build(name)
    shapes = tap_shapes(net, (1, 1, 64, 64), ["encoder", "decoder"])
    assert shapes["encoder"] == shapes["decoder"] == (1, channels, 16, 16)


# half precision and comparators
@pytest.mark.parametrize("kind", (torch.float16, torch.bfloat16))
def test_half_precision_is_widened(kind):
    torch.manual_seed(0)
    student, teacher = ([200 * torch.randn(2, 4, 8, 8, dtype=kind) for _ in range(2)] for _ in range(2)) # squares overflow float16
    losses = dict(inner=graph_flow, cosine=partial(graph_flow, edges="cosine"), coco=coco, fsp=fsp, ft=lambda s, t: ft(s[0], t[0]),
                  vid=lambda s, t: vid(s[0], torch.zeros(4), t[0]), pairwise=lambda s, t: pairwise(s[0], t[0]),
                  pixelwise=lambda s, t: pixelwise(s[0], t[0]))
    for name, loss in losses.items():
        found, wide = loss(student, teacher), loss([f.float() for f in student], [f.float() for f in teacher])
        torch.testing.assert_close(found, wide, msg=name)


def test_comparators_as_written():
    torch.manual_seed(0)
    (a_s, a_t), (b_s, b_t) = (torch.randn(2, 2, c, n, n, dtype=torch.float64) for c, n in ((3, 8), (4, 4)))
    flow = lambda a, b: torch.einsum("bchw,bdhw->bcd", F.adaptive_avg_pool2d(a, 4), b) / 16
    torch.testing.assert_close(fsp((a_s, b_s), (a_t, b_t)), (flow(a_s, b_s) - flow(a_t, b_t)).square().mean())
    unit = lambda f: f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(ft(a_s, a_t), (unit(a_s) - unit(a_t)).abs().mean())
    log_variance = torch.tensor([.1, -1, 2], dtype=torch.float64)
    spread = log_variance.view(1, 3, 1, 1)
    torch.testing.assert_close(vid(a_s, log_variance, a_t), (.5 * (spread + (a_s - a_t).square() / spread.exp())).mean())


# SKD
@pytest.mark.parametrize("ndim", (2, 3))
def test_pixelwise_is_the_sum_over_images(ndim):
    torch.manual_seed(0)
    z_s, z_t = torch.randn(2, 3, 4, *[5] * ndim, dtype=torch.float64)
    z_s.requires_grad_()
    value = pixelwise(z_s, z_t, "reference")
    torch.testing.assert_close(pixelwise(torch.cat([z_s, z_s]), torch.cat([z_t, z_t]), "reference"), 2 * value)
    torch.testing.assert_close(pixelwise(torch.cat([z_s, z_s]), torch.cat([z_t, z_t])), value / 3)
    grad, = torch.autograd.grad(value, z_s)
    torch.testing.assert_close(grad, (z_s.softmax(1) - z_t.softmax(1)) / 5 ** ndim)
    at_teacher, = torch.autograd.grad(pixelwise(x := z_t.clone().requires_grad_(), z_t), x)
    assert at_teacher.abs().max() < 1e-12


@pytest.mark.parametrize("scale", (.5, 1/6, 1/3))
@pytest.mark.parametrize("size", [(6, 6), (9, 7), (6, 8, 7)], ids=str)
def test_pairwise_as_written(size, scale):
    torch.manual_seed(0)
    f_s, f_t = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, *size, dtype=torch.float64)
    pool = F.max_pool2d if len(size) == 2 else F.max_pool3d
    def relations(f):
        nodes = pool(f, [int(n * scale) for n in size], ceil_mode=True).flatten(2)
        unit = nodes / (nodes.norm(dim=1, keepdim=True) + 1e-8).detach()
        return torch.einsum("bcm,bcn->bmn", unit, unit)
    plain = (relations(f_s) - relations(f_t)).square().mean()
    torch.testing.assert_close(pairwise(f_s, f_t, scale), plain)
    grads = [torch.autograd.grad(loss, f_s)[0] for loss in (pairwise(f_s, f_t, scale), plain)]
    torch.testing.assert_close(*grads)
    normal = F.normalize(f_s.detach(), dim=1)
    assert pairwise(normal, normal, scale).item() == pytest.approx(0, abs=1e-12)


def test_pairs_of_many_places_are_never_whole_in_memory():
    from torch.profiler import ProfilerActivity, profile
    f_s, f_t = torch.randn(1, 4, 64, 64, requires_grad=True), torch.randn(1, 4, 64, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: pairwise(f_s, f_t, 1/64).backward()
    changes = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    held, most = 0, 0
    for _, change in changes: most, held = max(most, held + change), held + change
    assert most < 4096 ** 2 * 4 # bytes of one map of relations


def test_spectral_norm_goes_on_in_eval():
    net = Discriminator(2, "tanh").eval()
    first, x = net.layers[0].parametrizations.weight[0], torch.randn(1, 2, 64, 64)
    before = first.u.clone()
    net(x)
    assert not torch.equal(first.u, before)
    for part in (first.u, first.v): assert part.norm().item() == pytest.approx(1, rel=1e-5)
    W, u = net.layers[0].parametrizations.weight.original.flatten(1), first.u.clone()
    v = F.normalize(W.T @ u, dim=0)
    u = F.normalize(W @ v, dim=0)
    torch.testing.assert_close(net.layers[0].weight.flatten(1), W / (u @ W @ v))


class Plain:
    "The discriminator from its formulas: tanh, four convolutions with a power iteration in every pass, attention, one convolution."
    def __init__(self, net):
        self.layers = list(net.layers)
        self.norms = {i: (part[0].u.clone(), part.original) for i, layer in enumerate(self.layers)
                      if (part := getattr(layer, "parametrizations", {}) and layer.parametrizations.weight)}

    def __call__(self, x, *image):
        x = torch.cat([*image, x.tanh()], 1)
        for i, layer in enumerate(self.layers):
            if i in self.norms: x = F.conv2d(x, self.weight(i), layer.bias, stride=2, padding=1)
            elif isinstance(layer, SelfAttention): x = self.attend(layer, x)
            else: x = layer(x)
        return x

    def weight(self, i):
        u, weight = self.norms[i]
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.T @ u, dim=0)
            u = F.normalize(matrix @ v, dim=0)
        self.norms[i] = u, weight
        return weight / (u @ matrix @ v)

    def attend(self, layer, x):
        q, k, v = (part(x).flatten(2) for part in (layer.query, layer.key, layer.value))
        return layer.gamma * torch.einsum("bcj,bij->bci", v, torch.einsum("bci,bcj->bij", q, k).softmax(2)).view_as(x) + x


@pytest.mark.parametrize("channels", (0, 1))
def test_the_discriminator_learns_as_written(channels):
    torch.manual_seed(0)
    adversary = Holistic(preprocess="tanh", scale=1., width=.125, image_channels=channels)
    adversary.build(*[dict(out=(2, 2, 64, 64))] * 2)
    net = adversary.net.double()
    for layer in net.layers:
        if isinstance(layer, SelfAttention): layer.gamma.data.fill_(.7)
    z_s, z_t = torch.randn(2, 2, 2, 64, 64, dtype=torch.float64)
    batch, plain = dict(image=torch.randn(2, 1, 64, 64, dtype=torch.float64)), Plain(net)
    shown = [batch["image"]] * channels
    torch.testing.assert_close(adversary.student(dict(out=z_s), {}, batch)["adversarial"], -plain(z_s, *shown).mean())
    torch.manual_seed(1)
    losses = adversary(dict(out=z_s), dict(out=z_t), batch)
    torch.manual_seed(1)
    d_t, d_s = plain(z_t, *shown), plain(z_s, *shown)
    alpha = torch.rand(2, 1, 1, 1).double()
    between = (alpha * z_t + (1 - alpha) * z_s).requires_grad_()
    slope, = torch.autograd.grad(plain(between, *shown).sum(), between, create_graph=True)
    expected = dict(discriminator=d_s.mean() - d_t.mean(), penalty=10 * (slope.flatten(1).norm(dim=1) - 1).square().mean())
    for name, loss in expected.items(): torch.testing.assert_close(losses[name], loss, msg=name)
    grads = [torch.autograd.grad(sum(found.values()), [*net.parameters()], allow_unused=True, materialize_grads=True)
             for found in (losses, expected)]
    for ours, theirs in zip(*grads): torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_penalty_is_zero_for_unit_gradients():
    class Sum(nn.Module):
        def forward(self, x): return x.flatten(1).sum(1) / x[0].numel() ** .5
    assert gradient_penalty(Sum(), *torch.randn(2, 3, 2, 4, 4)).item() == pytest.approx(0, abs=1e-10)


def test_the_adversary_is_one():
    assert issubclass(Holistic, Adversary) and Adversary().schedule(1, 2) == 1


# all stages
teacher_net, student_net = partial(build, "unet", width=.125), partial(build, "mobile_unet", width=.25)
squares = partial(toy.squares, n=8, size=64)
BASE = Recipe(data=squares, student=student_net, terms=(Seg,), weights=dict(seg=1), steps=1, batch_size=2, precision="fp32")
discriminate = partial(Holistic, preprocess="tanh", scale=1., lr=3e-5, optimiser=partial(torch.optim.Adam, betas=(.9, .99)),
                       schedule=poly)
seg = partial(Seg, F.cross_entropy)


def methods(paraphrasers):
    "name -> (terms, weights, adversary), as a paper notebook has them."
    return dict(
        graph_flow=((seg, partial(GraphFlow, paraphrasers), KD), dict(seg=1, vertex=1e-5, edge=1e-9, adversarial=.1, kd=1), discriminate),
        coco=((seg, CoCo), dict(seg=1, coco=1, adversarial=.1), partial(discriminate, image_channels=1)),
        skd=((seg, SKD), dict(seg=1, pixelwise=10, pairwise=1, adversarial=.1), partial(Holistic, "hinge")),
        fsp=((seg, partial(FSP, paraphrasers)), dict(seg=1, fsp=1), None),
        ft=((seg, partial(FT, paraphrasers)), dict(seg=1, ft=100), None),
        vid=((seg, VID), dict(seg=1, vid=1), None))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    "The teacher and its two Paraphrasers."
    folder = tmp_path_factory.mktemp("graph_flow")
    teacher = fit(replace(BASE, student=teacher_net), folder/"teacher")
    return teacher, *(fit(replace(
        BASE, student=partial(Paraphraser, 32, 8), teacher=teacher, student_input=partial(read_tap, tap=tap), lr=3e-4,
        terms=(partial(Paraphrase, tap),), weights=dict(paraphrase=1), validate=paraphrase_scores,
        optimiser=partial(torch.optim.SGD, momentum=.9, weight_decay=2e-4)), folder/f"paraphraser_{tap}")
        for tap in ("encoder", "decoder"))


def test_a_paraphraser_is_an_ordinary_run(stages):
    for run in stages[1:]:
        assert run.complete and set(run.metrics("val")[-1]["scores"]) == {"kept"}
        assert run.network().encode(torch.randn(1, 32, 4, 4)).shape == (1, 8, 4, 4)
        assert not read_json(run.path/"wiring.json")["unreached"]


@pytest.mark.parametrize("name", ["graph_flow", "coco", "skd", "fsp", "ft", "vid"])
def test_methods_train(name, stages, tmp_path):
    teacher, *paraphrasers = stages
    terms, weights, adversary = methods(tuple(paraphrasers))[name]
    run = fit(replace(BASE, teacher=teacher, terms=terms, weights=weights, adversary=adversary), tmp_path/name)
    wiring, rows = read_json(run.path/"wiring.json"), run.metrics("train")
    assert all(wiring[term]["gradient"] > 0 for term in weights)
    assert all(math.isfinite(x) for row in rows for part in ("losses", "adversary") for x in row.get(part, {}).values())
    own = {"graph_flow": {"discriminator", "penalty"}, "coco": {"discriminator", "penalty"}, "skd": {"discriminator"}}
    assert set(rows[0].get("adversary", {})) == own.get(name, set())
    state = read_checkpoint(run.path/"last.pt")
    kept = {name.split(".")[2] for name in state["objective"] if name.startswith("terms.")}
    assert kept == dict(ft={"translators"}, vid={"gaussians"}).get(name, set())
    if own.get(name): assert any(key.endswith("original") for key in state["adversary"]["network"])


def test_a_resumed_adversary_is_bit_identical(stages, tmp_path):
    teacher, *paraphrasers = stages
    terms, weights, adversary = methods(tuple(paraphrasers))["graph_flow"]
    recipe = replace(BASE, teacher=teacher, terms=terms, weights=weights, adversary=adversary, steps=2)
    whole = fit(recipe, tmp_path/"whole"/"run")
    with pytest.raises(KeyboardInterrupt), toy.stopping_after(1): fit(recipe, tmp_path/"cut"/"run", save_every=0)
    cut = fit(recipe, tmp_path/"cut"/"run")
    assert toy.outcome(cut.path) == toy.outcome(whole.path)


def test_two_processes(tmp_path):
    "Ranks end equal, and the curve is that of one process but for the penalty, whose points each rank draws for itself."
    base = replace(toy.alone, data=partial(toy.squares, size=64), teacher=toy.teacher, epochs=None, steps=2, lr=1e-3)
    paraphrasers = tuple(fit(replace(
        base, student=partial(Paraphraser, 8, 4), student_input=partial(read_tap, tap=tap), terms=(partial(Paraphrase, tap),),
        weights=dict(paraphrase=1), validate=paraphrase_scores, steps=1), tmp_path/tap) for tap in ("encoder", "decoder"))
    weights = dict(seg=1, vertex=1e-5, edge=1e-9, kd=1, pixelwise=1, pairwise=1, adversarial=.01)
    recipe = replace(base, adversary=discriminate, trainer=toy.Digests, weights=weights, terms=(
        Seg, partial(GraphFlow, paraphrasers), KD, partial(SKD, reduction="reference")))
    one, two = (fit(recipe, tmp_path/f"{n}"/"run", nproc=n) for n in (1, 2))
    first, second = (read_json(two.path/f"rank{rank}.json") for rank in (0, 1))
    assert first == second and first["adversary"]
    for step, (ours, theirs) in enumerate(zip(two.metrics("train"), one.metrics("train"), strict=True)):
        drawn = {"adversarial"} if step else set()
        for name in set(weights) - drawn: assert ours["losses"][name] == pytest.approx(theirs["losses"][name], rel=1e-3), name
        assert math.isfinite(ours["adversary"]["penalty"])


# bad input
def test_a_class_may_be_absent(stages, tmp_path):
    teacher, *paraphrasers = stages
    empty = toy.squares(n=8, size=64)
    empty.train.label.zero_()
    weights = dict(seg=1, vertex=1e-5, edge=1e-9, kd=1, pixelwise=1, pairwise=1)
    run = fit(replace(BASE, data=replace(empty, sha256="no squares"), teacher=teacher, weights=weights,
                      terms=(seg, partial(GraphFlow, paraphrasers), KD, SKD)), tmp_path/"x")
    assert all(math.isfinite(x) for x in run.metrics("train")[0]["losses"].values())


@pytest.mark.parametrize("term, names", [(GraphFlow, ("vertex", "edge")), (FSP, ("fsp",))])
def test_other_channels_stop_before_the_first_step(term, names, stages, tmp_path):
    recipe = replace(BASE, teacher=stages[0], terms=(term,), weights=dict.fromkeys(names, 1))
    with pytest.raises(ValueError, match=r"8 channels in 'encoder' .* the teacher 32: .* Paraphraser\(32, 8\)"):
        fit(recipe, tmp_path/"x")


def test_paraphrasers_of_another_teacher(stages, tmp_path):
    wide = build("unet", width=.25)
    recipe = replace(BASE, teacher=wide, terms=(partial(GraphFlow, stages[1:]),), weights=dict(vertex=1, edge=1))
    with pytest.raises(ValueError, match="built for a feature of 32 channels.* 64"): fit(recipe, tmp_path/"x")
    with pytest.raises(TypeError, match="UNet is no Paraphraser"): GraphFlow((wide, wide))


def test_without_a_teacher(tmp_path):
    for term, names in ((GraphFlow, ("vertex", "edge")), (VID, ("vid",)), (SKD, SKD.names)):
        with pytest.raises(KeyError, match="there is none"):
            fit(replace(BASE, terms=(term,), weights=dict.fromkeys(names, 1)), tmp_path/"x")


def test_images_too_small_for_the_discriminator(stages, tmp_path):
    recipe = replace(BASE, data=partial(toy.squares, size=32), teacher=stages[0], adversary=discriminate, weights=dict(seg=1, adversarial=1))
    with pytest.raises(ValueError, match=r"at least 64 .* \(32, 32\)"): fit(recipe, tmp_path/"x")


def test_maps_of_other_networks():
    "Any pair of taps of any size: named taps of an untouched network."
    taps = lambda n, c: Taps(dict(a=torch.randn(2, c, n, n), b=torch.randn(2, c, n // 2, n // 2), out=torch.randn(2, 2, 16, 16)))
    student, teacher, names = taps(8, 4), taps(12, 6), ("a", "b")
    held = [Paraphraser(6, 4) for _ in range(2)]
    for term in (GraphFlow(held, student=names), FSP(held, student=names), FT(held, student=names), VID(names), CoCo(student=names),
                 SKD("b")):
        term.build(*({n: tuple(t.shape) for n, t in x.items()} for x in (student, teacher)))
        assert all(torch.isfinite(x) for x in term(student, teacher, {}, frozenset(term.names)).values())


def test_the_benchmark_measures_the_parts(monkeypatch):
    import importlib
    import sys
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]/"benchmarks"))
    for name in ("common", "terms", "graph_flow"): monkeypatch.delitem(sys.modules, name, raising=False)
    bench = importlib.import_module("graph_flow")
    made = bench.setting(2, 64, .125)
    for call in dict(floor=bench.floor(*made[:2], made[2]["image"]), **bench.parts(*made)).values(): call()
    for name in ("common", "terms", "graph_flow"): sys.modules.pop(name)
