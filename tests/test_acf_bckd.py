"""ACF-BCKD: its parts against their equations, bad input, schedule, and a golden curve."""
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from medkd.core import Tapped, freeze, tap_shapes, toy_taps
from medkd.losses import boundary
from medkd.losses.acf_bckd import (ACFBCKD, AttentionCorrection, acf_bckd_weights, hard_boundary,
                                   hard_weight, soft_boundary)
from medkd.models.zoo import build

SIZES = {"2-D": (9, 7), "3-D": (6, 7, 5)}
SIZE = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
PRECISION = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def example(size, classes=4, seed=0):
    "Student and teacher logits in float64, and a label with some of the classes; smooth in places."
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 2, classes, *(2,) * len(size), generator=rng).flatten(0, 1)
    student, teacher = 4 * F.interpolate(coarse, size).double().view(2, 2, classes, *size)
    noise = torch.randn(2, 2, classes, *size, generator=rng)
    return student + noise[0], teacher + noise[1], (teacher + noise[1].roll(1, 0)).argmax(1)


def value_and_gradient(loss, student):
    student = student.detach().clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.detach(), student.grad


def assert_same(ours, plain, student, dtype=torch.float64, tolerance=None):
    "Values and gradients, to the tolerance of the type times the largest."
    tolerance = tolerance or (1e-9 if dtype == torch.float64 else 1e-5)
    expected = value_and_gradient(plain, student)
    for mine, theirs in zip(value_and_gradient(ours, student.to(dtype)), expected):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * scale)


# hard boundary
def plain_boundary(mask):
    "Of a (*S) mask, from the correlation with ones around nothing."
    conv = {2: F.conv2d, 3: F.conv3d}[mask.ndim]
    kernel = torch.ones(1, 1, *(3,) * mask.ndim, dtype=torch.float64)
    kernel.view(-1)[kernel.numel() // 2] = 0
    n = conv(mask.double()[None, None], kernel, padding=1)[0, 0].round()
    return (n > 0) & (n < kernel.sum())


def plain_hard(student, teacher, label, classes):
    total = 0 * student.sum()
    for s, t, y, c in ((*each, c) for each in zip(student, teacher, label) for c in range(classes)):
        edge = plain_boundary(y == c)
        if edge.any():
            total = total + F.kl_div(s.log_softmax(0)[:, edge], t.softmax(0)[:, edge], reduction="none").mean()
    return total


def plain_hard_of_masks(student, teacher, masks):
    total = 0 * student.sum()
    for s, t, m, c in ((*each, c) for each in zip(student, teacher, masks) for c in range(masks.shape[1])):
        edge = plain_boundary(m[c])
        if edge.any(): total = total + F.mse_loss(s.sigmoid()[:, edge], t.sigmoid()[:, edge])
    return total


@SIZE
@PRECISION
def test_hard_boundary(size, dtype):
    student, teacher, label = example(size)
    assert_same(lambda s: hard_boundary(s, teacher.to(s.dtype), label), lambda s: plain_hard(s, teacher, label, 4), student, dtype)


@SIZE
@PRECISION
def test_hard_boundary_of_overlapping_classes(size, dtype):
    student, teacher, _ = example(size, 3)
    masks = (teacher > .5).long()
    assert_same(lambda s: hard_boundary(s, teacher.to(s.dtype), masks, multi_label=True),
                lambda s: plain_hard_of_masks(s, teacher, masks), student, dtype)


def test_hard_boundary_of_the_first_classes_and_of_unknown_ones():
    student, teacher, label = example((6, 6, 6))
    assert_same(lambda s: hard_boundary(s, teacher, label, 2), lambda s: plain_hard(s, teacher, label, 2), student)
    strange = label.masked_fill(label == 3, -1).masked_fill(label == 2, 255)
    torch.testing.assert_close(hard_boundary(student, teacher, strange), plain_hard(student, teacher, label, 2))
    masks = (teacher > .5).long()
    first = hard_boundary(student, teacher, masks, 2, multi_label=True)
    masks[:, 2:] = 0
    torch.testing.assert_close(first, hard_boundary(student, teacher, masks, multi_label=True))


def test_hard_boundary_of_an_absent_class_is_left_out():
    student, teacher, _ = example((5, 5, 5))
    nothing = torch.zeros(2, 5, 5, 5, dtype=torch.long)
    value, gradient = value_and_gradient(lambda s: hard_boundary(s, teacher, nothing), student)
    torch.testing.assert_close(value, plain_hard(student, teacher, nothing, 4))
    value, gradient = value_and_gradient(lambda s: hard_boundary(s, teacher, nothing + 99), student)
    assert value == 0 and not gradient.any()


def test_a_label_of_another_size_is_brought_to_the_logits():
    student, teacher, label = example((4, 6))
    large = label.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert hard_boundary(student, teacher, large) == hard_boundary(student, teacher, label)


def test_label_and_multi_label_must_agree():
    student, teacher, label = example((4, 6))
    with pytest.raises(ValueError, match=r"label \(2, 4, 6\) for logits \(2, 4, 4, 6\)"):
        hard_boundary(student, teacher, label, multi_label=True)
    with pytest.raises(ValueError, match="multi_label=True"): hard_boundary(student, teacher, student > 0)


# soft boundary
def plain_distance(mask):
    if mask.all() or not mask.any(): return torch.zeros(mask.shape, dtype=torch.float64)
    return torch.from_numpy(distance_transform_edt(mask) + distance_transform_edt(~mask))


def plain_soft(prob, target):
    field = [torch.stack([plain_distance(m) for m in masks.flatten(0, 1)]).view(prob.shape)
             for masks in (prob.detach() > .5, target > .5)]
    return ((prob - target) ** 2 * (field[0] ** 2 + field[1] ** 2)).mean().add(1).log()


@SIZE
@PRECISION
@pytest.mark.parametrize("numba", [True, False])
def test_soft_boundary(size, dtype, numba, monkeypatch):
    monkeypatch.setattr(boundary, "_has_numba", lambda: numba)
    student, teacher, _ = example(size)
    target = F.one_hot(teacher.argmax(1), 4).movedim(-1, 1)[:, 1:].double()
    assert_same(lambda s: soft_boundary(s, teacher.to(s.dtype)), lambda s: plain_soft(s.softmax(1)[:, 1:], target), student, dtype)


@SIZE
def test_soft_boundary_of_overlapping_classes(size):
    student, teacher, _ = example(size, 3)
    target = (teacher.sigmoid() >= .5).double()
    assert_same(lambda s: soft_boundary(s, teacher, multi_label=True), lambda s: plain_soft(s.sigmoid(), target), student)


def test_soft_boundary_of_empty_and_full_masks():
    student, teacher = torch.zeros(2, 1, 3, 4, 4, 4)
    teacher[:, 1] = 9.
    value, gradient = value_and_gradient(lambda s: soft_boundary(s, teacher), student)
    assert value == 0 and not gradient.any()


def test_own_distance():
    student, teacher, _ = example((6, 6))
    ones = lambda masks: torch.ones(masks.shape)
    prob, target = student.softmax(1)[:, 1:], F.one_hot(teacher.argmax(1), 4).movedim(-1, 1)[:, 1:]
    torch.testing.assert_close(soft_boundary(student, teacher, distance=ones), (2 * (prob - target) ** 2).mean().log1p())


@pytest.mark.parametrize("shape", [(11,), (3, 40), (13, 8), (2, 30, 17), (9, 10, 11), (1, 1, 5)])
@pytest.mark.parametrize("share", [.003, .1, .5, .97])
def test_compiled_distances_equal_scipys(shape, share):
    rng = np.random.default_rng(int(1000 * share) + len(shape))
    for _ in range(5):
        mask = rng.random(shape) < share
        squared = boundary.compiled(mask)
        np.testing.assert_array_equal(squared, boundary.interpreted(mask))
        np.testing.assert_array_equal(squared, plain_distance(mask).square().round().numpy())


@pytest.mark.parametrize("threads", [1, 3])
def test_distances_do_not_depend_on_threads(threads):
    masks = torch.rand(7, 6, 5, 4) > .3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = boundary.squared_distance(masks)
    finally: torch.set_num_threads(before)
    assert found.dtype == torch.float32
    assert all(torch.equal(d.int(), torch.from_numpy(boundary.interpreted(m.numpy()))) for d, m in zip(found, masks))


# confidence
@pytest.mark.parametrize("kind", ["wrong", "right", "flat", "random"])
def test_finite_for_any_confidence(kind):
    _, teacher, label = example((5, 6, 4))
    sure = 1e4 * (2 * F.one_hot(label, 4).movedim(-1, 1).float() - 1)
    student = dict(wrong=sure.roll(1, 1), right=sure, flat=0 * sure, random=1e4 * (2 * torch.rand(sure.shape) - 1))[kind]
    masks = (sure > 0).long()
    losses = [lambda s: hard_boundary(s, sure, label), lambda s: hard_boundary(s, sure, masks, multi_label=True),
              lambda s: soft_boundary(s, sure), lambda s: soft_boundary(s, sure, multi_label=True)]
    for loss in losses:
        value, gradient = value_and_gradient(loss, student)
        assert value.isfinite() and gradient.isfinite().all()


# attention correction
def plain_correction(module, student, out, branch):
    "Equations from the module's own weights, everything resized before it is compared."
    conv = {4: F.conv2d, 5: F.conv3d}[student.ndim]
    hard = lambda x: ((x + 3) / 6).clamp(0, 1)
    (w1, b1, w2, b2), (w, b) = module.channel.parameters(), module.spatial.parameters()
    pooled = student.flatten(2).mean(2).view(*student.shape[:2], *[1] * (student.ndim - 2))
    gate = hard(conv(conv(pooled, w1, b1).relu(), w2, b2)) * hard(conv(student.mean(1, keepdim=True), w, b, padding=3))
    factor = conv(gate, module.convertor.weight, module.convertor.bias)
    def energy(x):
        x = F.interpolate(x, out.shape[2:], mode="nearest").square().mean(1).flatten(1)
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return [(energy(mine) - energy(theirs)).square().mean() for mine, theirs in ((student * gate, out), (factor, branch))]


@pytest.mark.parametrize("mine,theirs", [((4, 4, 6), (4, 4, 6)), ((4, 4, 6), (8, 8, 12)), ((8, 8, 8), (4, 4, 4)), ((6, 8), (12, 4))])
def test_attention_correction(mine, theirs):
    torch.manual_seed(0)
    module = AttentionCorrection(16, len(mine)).double()
    for parameter in module.parameters(): torch.nn.init.normal_(parameter, std=.3)
    student = torch.randn(2, 16, *mine, dtype=torch.float64)
    out, branch = (torch.randn(2, 24, *theirs, dtype=torch.float64).requires_grad_() for _ in range(2))
    for part in (0, 1):
        assert_same(lambda s: 25000 * module(s, out, branch)[part],
                    lambda s: 25000 * plain_correction(module, s, out.detach(), branch.detach())[part], student,
                    tolerance=1e-7) # torch's hard sigmoid takes 1/6 from float32
    assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert out.grad is None and branch.grad is None


def test_attention_starts_as_published():
    module = AttentionCorrection(64)
    weights = [m.weight for m in module.modules() if hasattr(m, "weight")]
    assert all(not m.bias.any() for m in module.modules() if hasattr(m, "bias"))
    fan_out = [w.shape[0] * w[0, 0].numel() for w in weights]
    assert all(abs(w.std() * (f / 2) ** .5 - 1) < .3 for w, f in zip(weights, fan_out))


def test_dead_features_have_finite_gradients():
    module, student = AttentionCorrection(8), torch.zeros(1, 8, 4, 4, 4, requires_grad=True)
    sum(module(student, torch.zeros(1, 8, 4, 4, 4), torch.zeros(1, 8, 4, 4, 4))).backward()
    assert student.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


# the term
def built(**options):
    term, (student, teacher, batch) = ACFBCKD(**options), toy_taps(3, 3, (8, 12), dict(decoder=2, branch=4, as_published=2))
    torch.manual_seed(0)
    term.build(*({name: tap.shape for name, tap in taps.items()} for taps in (student, teacher)))
    return term, student, teacher, batch


def losses(term, student, teacher, batch, active=ACFBCKD.names):
    return term(student, teacher, batch, frozenset(active))


def test_term_wires_its_parts():
    term, student, teacher, batch = built()
    found = losses(term, student, teacher, batch)
    pair = student["out"], teacher["out"]
    parts = term.correction(student["decoder"], teacher["decoder"], teacher["branch"])
    expected = dict(zip(term.names, (hard_boundary(*pair, batch["label"]), soft_boundary(*pair), *parts)))
    assert found == expected
    assert list(losses(term, student, teacher, batch, ["cfd"])) == ["cfd"]
    as_published, *_ = built(teacher_residual="as_published")
    assert losses(as_published, student, teacher, batch)["cfd"] != found["cfd"]


def test_hard_boundary_reads_labelled_anchors_only():
    term, student, teacher, batch = built()
    found = losses(term, student, teacher, batch | dict(labelled=torch.tensor([False, True])))
    assert found["hbd"] == hard_boundary(student["out"][1:], teacher["out"][1:], batch["label"][1:])
    assert found["sbd"] == soft_boundary(student["out"], teacher["out"])
    none = losses(term, student, teacher, batch | dict(labelled=torch.tensor([False, False])))
    assert none["hbd"] == 0 and none["hbd"].requires_grad


def test_hard_boundary_is_the_sum_over_the_images_of_all_processes(monkeypatch):
    "Gradients are averaged over processes, each of which has its part of the images."
    term, student, teacher, batch = built()
    whole = losses(term, student, teacher, batch, ["hbd"])["hbd"]
    monkeypatch.setattr("medkd.losses.acf_bckd.processes", lambda: 2)
    cut = lambda taps, i: {name: tap[i:i + 1] for name, tap in taps.items() if torch.is_tensor(tap)}
    halves = [losses(term, cut(student, i), cut(teacher, i), cut(batch, i), ["hbd"])["hbd"] for i in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_overlapping_classes():
    term, student, teacher, batch = built(multi_label=True)
    masks = torch.stack([batch["label"] > 0, batch["label"] > 1, batch["label"] == 1], 1)
    found = losses(term, student, teacher, batch | dict(label=masks))
    assert found["hbd"] == hard_boundary(student["out"], teacher["out"], masks, multi_label=True)
    assert found["sbd"] == soft_boundary(student["out"], teacher["out"], multi_label=True)


@pytest.mark.parametrize("step,floor,epochs,last", [(.001, .001, 1000, .001), (.0005, .5, 1000, .5005), (.0015, .5, 300, .5515), (.01, .5, 50, .51)])
def test_schedule_is_the_recurrence(step, floor, epochs, last):
    weights, alpha = acf_bckd_weights(step, floor), 1.
    for epoch, progress in product(range(epochs), (0, .99)):
        assert weights["hbd"](epoch + progress) == pytest.approx(alpha)
        assert weights["sbd"](epoch + progress) == pytest.approx(1 - alpha)
        if progress: alpha = max(alpha - step, floor)
    assert hard_weight(epochs - 1, step, floor) == pytest.approx(last, abs=1e-12)
    assert weights["afd"] == weights["cfd"] == 25000


# the networks of the paper
TABLE = dict(unet3d_tiny=(32, 48), espnetv2_3d=(32, 48), mobile_unet3d=(16, 96), lcovnet=(16, 96), resunet3d=(64, 48), segresnet=(16, 96))


@pytest.mark.parametrize("name", TABLE)
def test_taps_are_the_papers(name):
    channels, size = TABLE[name]
    with torch.device("meta"): net = build(name, 1, 14)
    teacher = name in ("resunet3d", "segresnet")
    roles = ACFBCKD().needs[1] if teacher else ACFBCKD().needs[0]
    shapes = tap_shapes(net, (1, 1, 96, 96, 96), roles)
    assert {shape for tap, shape in shapes.items() if tap != "out"} == {(1, channels, size, size, size)}
    assert shapes["out"] == (1, 14, 96, 96, 96)


@pytest.mark.parametrize("name", ["resunet3d", "segresnet"])
def test_published_residual(name):
    "What the released hook saw: SegResNet's sum, ResU-Net's branch."
    torch.manual_seed(0)
    taps = Tapped(build(name, 1, 3, .125), ["decoder", "branch", "as_published"])(torch.randn(1, 1, 16, 16, 16))
    assert torch.equal(taps["as_published"], taps["decoder" if name == "segresnet" else "branch"])
    assert not torch.equal(taps["branch"], taps["decoder"])


@pytest.mark.parametrize("teacher", ["resunet3d", "segresnet"])
@pytest.mark.parametrize("student", ["unet3d_tiny", "espnetv2_3d", "mobile_unet3d", "lcovnet"])
def test_one_step_of_a_pair(student, teacher):
    torch.manual_seed(0)
    nets = build(student, 1, 3, .25), freeze(build(teacher, 1, 3, .125))
    term, x = ACFBCKD(), torch.randn(2, 1, 32, 32, 32)
    mine, theirs = (Tapped(net, names)(x) for net, names in zip(nets, term.needs))
    term.build(*({name: tap.shape for name, tap in taps.items()} for taps in (mine, theirs)))
    sum(losses(term, mine, theirs, dict(label=theirs["out"].argmax(1))).values()).backward()
    assert all(p.grad.isfinite().all() for p in nets[0].parameters() if p.grad is not None)
    assert all(p.grad.abs().max() > 0 for p in term.parameters())
