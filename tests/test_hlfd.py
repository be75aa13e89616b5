"HLFD, EMKD and Hilbert distillation: equations in two and three axes, objectives on networks, bad input."
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

from medkd.core import Tapped, Taps
from medkd.losses.contracts import shapes
from medkd.losses.emkd import EMKD, rad
from medkd.losses.hilbert import Hilbert, curve, hilbert, path
from medkd.losses.hlfd import (HLFD, OBJECTIVES, cat_imd, cat_pmd, cosine_steps, imd, kl_map, pmd, rec_imd,
                               rec_pmd)
from medkd.losses.task import Seg, focal_dice
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit

MODES = {2: "bilinear", 3: "trilinear"}


def maps(ndim, *sizes, seed=0):
    "Random maps (2,C,*S), S from the first axes of `size`."
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, *size[:ndim], generator=rng) for c, *size in sizes]


def projector(cin, cout, ndim, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(cout, cin, *[1] * ndim, generator=rng), torch.randn(cout, generator=rng)


def to(x, size): return F.interpolate(x, tuple(size), mode=MODES[x.ndim - 2])


def project(x, weight, bias):
    "1x1 convolution as a product of matrices."
    return torch.einsum("oc,bc...->bo...", weight.flatten(1), x) + bias.view(-1, *[1] * (x.ndim - 2))


def kl(s, t, tau=4.):
    p, q = (s / tau).softmax(1), (t / tau).softmax(1)
    return tau ** 2 * (q * (q.log() - p.log())).sum(1).mean()


def attention(x):
    a = (x ** 4).mean(1).flatten(1)
    return a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)


def gap(s, t): return ((attention(s) - attention(t)) ** 2).sum(1).mean()


# elementary losses ---------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [2, 3, 8])
def test_map_distance_and_its_released_scale(channels):
    s, t = maps(2, (channels, 6, 5), (channels, 6, 5))
    assert kl_map(s, t).item() == pytest.approx(kl(s, t).item(), rel=1e-5)
    if s.numel() % 2 == 0:
        rows = [z.reshape(-1, 2) for z in ((s / 4).log_softmax(1), (t / 4).softmax(1))] # as in the released code
        released = 16 * F.kl_div(*rows, reduction="batchmean")
        assert kl_map(s, t, legacy_pairs=True).item() == pytest.approx(released.item(), rel=1e-5)
    assert kl_map(s, t, legacy_pairs=True).item() == pytest.approx(2 / channels * kl_map(s, t).item(), rel=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_pixel_maps(ndim):
    a, b, t = maps(ndim, (3, 8, 6, 4), (5, 4, 6, 4), (4, 8, 12, 6))
    small, size = min(tuple(x.shape[2:]) for x in (a, b)), t.shape[2:]
    both = torch.cat([to(a, small), to(b, small)], 1)
    w, bias = projector(3, 4, ndim)
    assert pmd(a, t, w, bias).item() == pytest.approx(kl(to(project(a, w, bias), size), t).item(), rel=1e-5)
    w, bias = projector(8, 4, ndim)
    combined = to(project(both, w, bias), size)
    assert cat_pmd([a, b], t, w, bias).item() == pytest.approx(kl(combined, t).item(), rel=1e-5)
    assert rec_pmd(t, [a, b], w, bias).item() == pytest.approx(kl(t, combined).item(), rel=1e-5)
    assert pmd(a, t, *projector(3, 4, ndim), tau=1.).item() == pytest.approx(
        kl(to(project(a, *projector(3, 4, ndim)), size), t, 1.).item(), rel=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_attention_maps(ndim):
    a, b, t = maps(ndim, (70, 8, 6, 4), (5, 4, 6, 4), (4, 8, 12, 6))
    small, size = (4, 6, 4)[:ndim], t.shape[2:]
    both = to(torch.cat([to(a, small), to(b, small)], 1), size)
    assert imd(a, t).item() == pytest.approx(gap(to(a, size), t).item(), rel=1e-4)
    assert cat_imd([a, b], t).item() == pytest.approx(gap(both, t).item(), rel=1e-4)
    assert rec_imd(t, [a, b]).item() == pytest.approx(gap(t, both).item(), rel=1e-4)
    assert imd(t, t).item() == 0 and imd(-t, t).item() == 0


def test_gradients_of_all():
    a, b, t = maps(2, (3, 8, 6), (5, 4, 6), (4, 8, 12))
    losses = dict(pmd=lambda s: pmd(s, t, *projector(3, 4, 2)), imd=lambda s: imd(s, t),
                  cat_pmd=lambda s: cat_pmd([s, b], t, *projector(8, 4, 2)), cat_imd=lambda s: cat_imd([s, b], t),
                  rec_pmd=lambda s: rec_pmd(s, [b, t], *projector(9, 3, 2)), rec_imd=lambda s: rec_imd(s, [b, t]))
    others = [b.requires_grad_(), t.requires_grad_()]
    for name, loss in losses.items():
        value = loss(a.requires_grad_())
        grad, *rest = torch.autograd.grad(value, [a, *others], allow_unused=True)
        step = 1e-3 * grad / grad.norm()
        with torch.no_grad(): change = loss(a + step) - loss(a - step)
        assert change.item() == pytest.approx(2e-3 * grad.norm().item(), rel=.05), name
        assert rest[1] is None, f"{name}: no gradient in the teacher"


def test_projector_of_the_teachers_side_is_trained():
    a, b, s = maps(2, (3, 8, 6), (5, 8, 6), (4, 8, 6))
    w, bias = (x.requires_grad_() for x in projector(8, 4, 2))
    mine = rec_pmd(s, [a, b], w, bias)
    plain = kl(s, project(torch.cat([a, b], 1), w, bias))
    for ours, theirs in zip(torch.autograd.grad(mine, [w, bias]), torch.autograd.grad(plain, [w, bias])):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_extreme_features_stay_finite():
    big = 300 * torch.randn(2, 4, 8, 8, dtype=torch.float16)
    zero = torch.zeros(2, 4, 8, 8, requires_grad=True)
    for s, t in ((big, -big), (zero, big), (zero, zero.detach())):
        s = s.detach().requires_grad_()
        total = imd(s, t) + kl_map(s, t)
        total.backward()
        assert total.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize("call,says", [
    (lambda a, t: kl_map(a, t), "cannot be compared"), (lambda a, t: pmd(a, t, *projector(4, 4, 2)), "the maps have 3"),
    (lambda a, t: pmd(a, t, *projector(3, 5, 2)), "cannot be compared"),
    (lambda a, t: cat_pmd([a, a], t, *projector(3, 4, 2)), r"the maps have 3 \+ 3"),
    (lambda a, t: rec_pmd(a, [t, t], *projector(8, 4, 2)), "cannot be compared")])
def test_shapes_that_do_not_fit(call, says):
    with pytest.raises(ValueError, match=says): call(*maps(2, (3, 8, 6), (4, 8, 6)))


# objectives ----------------------------------------------------------------------------------------

ROLES = {"out", *(f"e{i}" for i in range(1, 6)), *(f"d{i}" for i in range(2, 6))}
PAIRS = [("unet_plus_plus", "resnet18"), ("unet", "unet"), ("raunet", "unet_resnet18"), ("unet_plus_plus", "mobile_unet")]


def taps(name, seed=0, size=64):
    torch.manual_seed(seed)
    net = Tapped(build(name, 1, 2, width=.125), sorted(ROLES))
    return net(torch.randn(2, 1, size, size))


@pytest.mark.parametrize("teacher,student", PAIRS)
def test_networks_have_the_twenty_taps(teacher, student):
    with torch.no_grad(): t = taps(teacher, 1)
    s = taps(student)
    for objective in OBJECTIVES:
        term = HLFD(objective)
        term.build(shapes(s), shapes(t))
        losses = term(s, t, {}, frozenset(term.names))
        parameters = [*term.parameters()]
        grads = torch.autograd.grad(sum(losses.values()), [*parameters, s["e2"], s["out"]], allow_unused=True, retain_graph=True)
        assert all(x.isfinite() for x in losses.values())
        assert all(g is not None and g.abs().max() > 0 for g in grads[:len(parameters)]), objective


def test_which_taps_which_objective_reads():
    used = {name: [set(side) for side in HLFD(name).needs] for name in OBJECTIVES}
    assert used["attn_kd"] == [{"e5"}, {"e5"}] and used["wo_feedback"] == [{"e5", "out"}] * 2
    assert used["deep_kd"] == [ROLES, ROLES]
    assert used["hlfd"] == [{"d5", "d4", "d3", "d2", "e1", "e2", "e3", "e4"}, {"d5", "d4", "d3", "e2", "e3", "e4", "e5", "out"}]
    assert used["cat_feedback"] == [ROLES, {"e5", "out"}]
    assert used["indv_feedback"] == [{"out", "d4", "d2", "e5", "e2", "e4"}, {"out", "e5"}]
    assert HLFD("attn_kd").names == ("feature",) and HLFD().names == ("pixel", "feature")


def test_deep_kd_without_and_with_the_slip():
    s, t = taps("unet"), taps("unet", 1)
    values = []
    for slip in (False, True):
        term = HLFD("deep_kd", legacy_self_d5=slip)
        torch.manual_seed(3)
        term.build(shapes(s), shapes(t))
        w = [(p.weight, p.bias) for p in term.projectors]
        values.append(term(s, t, {}, frozenset(["pixel"]))["pixel"])
        names = ("out", "d5", "d4", "d3", "d2")
        targets = [s[n] if slip and n == "d5" else t[n] for n in names]
        assert values[-1].item() == pytest.approx(sum(pmd(s[n], x, *p) for n, x, p in zip(names, targets, w)).item(), rel=1e-5)
    assert values[0] != values[1]


def test_released_scale_only_changes_more_than_two_channels():
    s, t = taps("unet"), taps("unet", 1)
    def pixel(objective, **options):
        term = HLFD(objective, **options)
        torch.manual_seed(3)
        term.build(shapes(s), shapes(t))
        return term(s, t, {}, frozenset(["pixel"]))["pixel"].item()
    assert pixel("cat_feedback") == pytest.approx(pixel("cat_feedback", legacy_pairs=True))
    assert pixel("hlfd") > pixel("hlfd", legacy_pairs=True)


@pytest.mark.parametrize("options,error,says", [
    (dict(objective="hlfb"), KeyError, "did you mean hlfd"), (dict(projector="frozen"), ValueError, "'learned' or 'random'"),
    (dict(legacy_self_d5=True), ValueError, "belongs to 'deep_kd'")])
def test_wrong_options(options, error, says):
    with pytest.raises(error, match=says): HLFD(**options)


def test_learning_rate():
    optimiser = torch.optim.Adam([torch.zeros(1)], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 120, 1e-6)
    for epoch in range(120):
        assert 1e-2 * cosine_steps(epoch + .7, 120) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimiser.step(), schedule.step()


# EMKD ----------------------------------------------------------------------------------------------

def released_rad(s, t, label):
    "With one-hot masks, as the released code."
    def affinity(x):
        g = torch.stack([label == 0, label > 0], 1).float()
        g = F.interpolate(g, x.shape[2:], mode="nearest")
        r0 = (x * g[:, :1]).sum((2, 3)) / g[:, 0].sum((1, 2))[:, None]
        r1 = (x * g[:, 1:]).sum((2, 3)) / (g[:, 1].sum((1, 2)) + 1)[:, None]
        return F.cosine_similarity(r0, r1)
    return ((affinity(s) - affinity(t)) ** 2).mean()


def test_region_affinity():
    s, t = maps(2, (6, 8, 8), (9, 8, 8))
    label = (torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) < .3).long()
    assert rad(s, t, label).item() == pytest.approx(released_rad(s, t, label).item(), rel=1e-5)
    assert rad(s, t, 2 * label).item() == pytest.approx(rad(s, t, label).item(), rel=1e-5)


@pytest.mark.parametrize("value", [0, 1, 255, -1])
def test_one_region_alone_says_nothing(value):
    s, t = maps(2, (6, 8, 8), (9, 8, 8))
    loss = rad(s.requires_grad_(), t, torch.full((2, 8, 8), value))
    loss.backward()
    assert loss.item() == 0 and s.grad.abs().max() == 0


def test_emkd_on_published_pairs():
    with torch.no_grad(): t = Tapped(build("raunet", 1, 2, .125), ["low", "high"])(torch.randn(2, 1, 64, 64))
    for name in ("resnet18", "unet", "unet_plus_plus"):
        s = Tapped(build(name, 1, 2, .125), ["low", "high"])(torch.randn(2, 1, 64, 64))
        label = torch.zeros(2, 64, 64, dtype=torch.long)
        label[:, 20:40, 20:40] = 1
        losses = EMKD()(s, t, dict(label=label), frozenset(EMKD.names))
        assert set(losses) == {"pmd", "imd", "rad"} and all(x.isfinite() and x > 0 for x in losses.values())


# Hilbert -------------------------------------------------------------------------------------------

def test_curve_is_that_of_the_package():
    "Points of hilbertcurve 2.0.5, and a number that stands for all of a larger curve."
    assert curve(2, 2).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1], [0, 2], [0, 3], [1, 3], [1, 2],
                                    [2, 2], [2, 3], [3, 3], [3, 2], [3, 1], [2, 1], [2, 0], [3, 0]]
    assert curve(1, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 0, 0]]
    for order, ndim, expected in CURVES:
        points = curve(order, ndim)
        flat = points @ (2 ** order) ** np.arange(ndim)[::-1]
        assert int((flat * np.arange(len(flat))).sum()) == expected


CURVES = [(5, 2, 339494144), (4, 3, 21534622720)]


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (1, 5), (3, 4, 5), (8, 2, 2)])
def test_every_place_comes_once(size):
    places = path(size)
    assert sorted(places.tolist()) == list(range(int(np.prod(size))))


def test_teacher_with_another_axis():
    s, t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 4, 8, 8, requires_grad=True)
    loss = hilbert(s, t)
    loss.backward()
    assert s.grad.abs().max() > 0 and t.grad is None and 0 < loss < 1
    assert hilbert(s, 7 * s.detach()).item() == pytest.approx(0, abs=1e-9)


def test_released_index():
    s, t = torch.randn(2, 2, 4, 6, 6)
    assert hilbert(s[:1], t[:1], True) == hilbert(s[:1], t[:1])
    assert len(set(path((2, 28, 28), True).tolist())) == 840
    with pytest.raises(ValueError, match="no higher than wide"): path((9, 4), True)


# training ------------------------------------------------------------------------------------------

alone = Recipe(data=partial(toy.squares, size=32), student=partial(build, "resnet18", 1, 2, .125), terms=(partial(Seg, focal_dice),),
               weights=dict(seg=1), steps=4, batch_size=4, lr=1e-3, optimiser=torch.optim.Adam, schedule=cosine_steps,
               precision="fp32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    recipe = replace(alone, student=partial(build, "unet_plus_plus", 1, 2, .125))
    return fit(recipe, tmp_path_factory.mktemp("runs")/"teacher")


METHODS = dict(
    hlfd=((HLFD,), dict(pixel=.1, feature=.9)), attn_kd=((partial(HLFD, "attn_kd"),), dict(feature=1.)),
    random=((partial(HLFD, projector="random"),), dict(pixel=.1, feature=.9)),
    emkd=((EMKD,), dict(pmd=.1, imd=.9, rad=.9)), hilbert=((Hilbert,), dict(hilbert=.1)))


def distilled(teacher, method):
    terms, weights = METHODS[method]
    return replace(alone, teacher=teacher, terms=(*alone.terms, *terms), weights=dict(seg=1, **weights))


@pytest.mark.parametrize("method", METHODS)
def test_training(method, teacher, tmp_path):
    run = fit(distilled(teacher, method), tmp_path/"run")
    rows = run.metrics("train")
    assert len(rows) == 4 and all(np.isfinite(list(row["losses"].values())).all() for row in rows)


def test_drawn_projectors_are_the_same_after_an_interruption(teacher, tmp_path):
    recipe = distilled(teacher, "random")
    whole = fit(recipe, tmp_path/"whole/run")
    with toy.stopping_after(2), pytest.raises(KeyboardInterrupt): fit(recipe, tmp_path/"cut/run", save_every=0.)
    assert toy.outcome(fit(recipe, tmp_path/"cut/run").path) == toy.outcome(whole.path)


class Background(toy.Squares):
    "Without any foreground."
    def __getitem__(self, i): return super().__getitem__(i) | dict(label=torch.zeros_like(self.label[i]))


@pytest.mark.parametrize("method", ["hlfd", "emkd"])
def test_batches_of_background_alone(method, teacher, tmp_path):
    recipe = replace(distilled(teacher, method), data=partial(toy.squares, Background, size=32))
    rows = fit(recipe, tmp_path/"run").metrics("train")
    assert all(np.isfinite(list(row["losses"].values())).all() for row in rows)
    if method == "emkd": assert all(row["losses"]["rad"] == 0 for row in rows)


def test_terms_read_what_they_need():
    assert HLFD.example(3, 4)[0].needs == HLFD().needs
    with pytest.raises(KeyError, match="there is none"): HLFD()(Taps(), Taps(), {}, frozenset(["feature"]))
