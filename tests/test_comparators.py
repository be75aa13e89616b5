"""The comparators of ACF-BCKD against their equations as published, written out in float64."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from medkd.losses.logits import (DKD, NKD, cwd, dist, dkd, kd_kl, kd_sigmoid_mse, nkd)

SHAPES = [(2, 2, 6, 5), (2, 4, 5, 4, 6)]


def logits(shape, seed=0, scale=2.):
    "Student, teacher, label: smooth enough that teacher and label agree on most positions."
    rng = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, *shape, generator=rng, dtype=torch.float64)
    label = (teacher + .5 * torch.randn(shape, generator=rng)).argmax(1)
    return student, teacher, label


def value_and_gradient(loss, student):
    student = student.detach().clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.detach(), student.grad


def assert_same(ours, plain, student, dtype=torch.float64):
    "Values and gradients to 1e-5, in float64 to 1e-9, of the largest."
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    expected = value_and_gradient(plain, student)
    for mine, theirs in zip(value_and_gradient(ours, student.to(dtype)), expected):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * scale)


def kl(log_p, q): return (q * (q.log() - log_p)).sum()


def plain_cwd(s, t, tau=4.):
    return sum(kl((a / tau).log_softmax(0), (b / tau).softmax(0))
               for a, b in zip(s.flatten(2).flatten(0, 1), t.flatten(2).flatten(0, 1))) * tau ** 2 / s[:, :, 0].numel() * s[0, 0, 0].numel()


def pearson(x, y):
    "Of the rows of two matrices."
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def plain_dist(s, t, tau=4.):
    s, t = ((z / tau).softmax(1).movedim(1, -1).flatten(0, -2) for z in (s, t))
    return tau ** 2 * (1 - pearson(s, t).mean() + 1 - pearson(s.T, t.T).mean())


def rows(z): return z.movedim(1, -1).flatten(0, -2)


def plain_dkd(s, t, label, tau=4., alpha=1., beta=8.):
    mark = F.one_hot(label.flatten(), s.shape[1]).double()
    s, t = rows(s) / tau, rows(t) / tau
    split = [torch.stack([(p * mark).sum(1), (p * (1 - mark)).sum(1)], 1) for p in (s.softmax(1), t.softmax(1))]
    others = (s - 1000 * mark).log_softmax(1), (t - 1000 * mark)
    tckd = kl(split[0].log(), split[1])
    nckd = F.kl_div(others[0], others[1].softmax(1), reduction="sum")
    return tau ** 2 * (alpha * tckd + beta * nckd) / label.numel()


def plain_nkd(s, t, label, tau=1., gamma=1.5):
    s, t, label = rows(s), rows(t), label.flatten()[:, None]
    own = (t.softmax(1) * s.log_softmax(1)).gather(1, label).mean()
    left = torch.ones_like(s, dtype=torch.bool).scatter_(1, label, False)
    s, t = (z[left].view(len(z), -1) / tau for z in (s, t))
    return -own - gamma * tau ** 2 * (t.softmax(1) * s.log_softmax(1)).sum(1).mean()


def plain_masks_dkd(s, t, masks):
    left = 1 - masks.double()
    square = lambda a, b: (a.sigmoid() - b.sigmoid()).square().sum()
    return (square(s, t) + 8 * square(s * left, t * left)) / s.numel()


UNLABELLED = {
    "kd": (kd_kl, lambda s, t: kl(s.log_softmax(1), t.softmax(1)) / s[:, 0].numel()),
    "kd, 3": (partial(kd_kl, tau=3.), lambda s, t: 9 * kl((s / 3).log_softmax(1), (t / 3).softmax(1)) / s[:, 0].numel()),
    "kd, sigmoid": (kd_sigmoid_mse, lambda s, t: (s.sigmoid() - t.sigmoid()).square().mean()),
    "cwd": (cwd, lambda s, t: plain_cwd(s, t)),
    "dist": (dist, plain_dist),
}
LABELLED = {
    "dkd": (dkd, plain_dkd),
    "dkd, other weights": (partial(dkd, tau=1.5, alpha=2., beta=.5), partial(plain_dkd, tau=1.5, alpha=2., beta=.5)),
    "nkd": (nkd, plain_nkd),
    "nkd, 2": (partial(nkd, tau=2., gamma=.7), partial(plain_nkd, tau=2., gamma=.7)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", UNLABELLED)
def test_logits(name, shape, dtype):
    ours, plain = UNLABELLED[name]
    student, teacher, _ = logits(shape)
    assert_same(lambda s: ours(s, teacher.to(s.dtype)), lambda s: plain(s, teacher), student, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "3-D"])
@pytest.mark.parametrize("name", LABELLED)
def test_logits_and_label(name, shape, dtype):
    ours, plain = LABELLED[name]
    student, teacher, label = logits(shape)
    assert_same(lambda s: ours(s, teacher.to(s.dtype), label), lambda s: plain(s, teacher, label), student, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "3-D"])
def test_dkd_of_overlapping_classes(shape):
    student, teacher, _ = logits(shape)
    masks = teacher > .3
    assert_same(lambda s: dkd(s, teacher, masks.long()), lambda s: plain_masks_dkd(s, teacher, masks), student)


def test_a_label_of_another_size_is_brought_to_the_logits():
    student, teacher, label = logits((2, 3, 4, 4))
    large = label.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for loss in (dkd, nkd): assert loss(student, teacher, large) == loss(student, teacher, label)


def confident(kind):
    "Student and teacher logits (1,3,2,2,2) of up to +-1e4, label 0."
    sure = torch.full((1, 3, 2, 2, 2), -1e4)
    sure[:, 0] = 1e4
    pairs = dict(wrong=(sure.roll(1, 1), sure), right=(sure, sure), flat=(0 * sure, sure), both=(sure.roll(1, 1), sure.roll(2, 1)),
                 random=tuple(1e4 * torch.randn(2, *sure.shape).clamp(-1, 1)))
    return *pairs[kind], torch.zeros(1, 2, 2, 2, dtype=torch.long)


@pytest.mark.parametrize("kind", ["wrong", "right", "flat", "both", "random"])
@pytest.mark.parametrize("name", [*UNLABELLED, *LABELLED])
def test_finite_for_any_confidence(name, kind):
    student, teacher, label = confident(kind)
    loss, extra = (LABELLED[name][0], (label,)) if name in LABELLED else (UNLABELLED[name][0], ())
    value, gradient = value_and_gradient(lambda s: loss(s, teacher, *extra), student)
    assert value.isfinite() and gradient.isfinite().all()


def test_dkd_masks_what_no_subtraction_masks():
    "A student that is sure of the label: 1000 / tau would not take it out."
    student = torch.tensor([9000., 1., 0.]).view(1, 3, 1, 1)
    teacher = torch.tensor([5., 0., 2.]).view(1, 3, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    others = kd_kl(student[:, 1:], teacher[:, 1:], 4.)
    torch.testing.assert_close(dkd(student, teacher, label, alpha=0., beta=1.), others)


@pytest.mark.parametrize("cls", [DKD, NKD])
def test_only_labelled_anchors_count(cls):
    term, student, teacher, batch = cls.example(3, 3)
    name, = term.names
    both = term(student, teacher, batch, frozenset(term.names))[name]
    one = [term(student, teacher, batch | dict(view=torch.tensor(view)), frozenset(term.names))[name] for view in ([0, 1], [1, 0])]
    torch.testing.assert_close(sum(one) / 2, both)
    none = term(student, teacher, batch | dict(labelled=torch.tensor([0, 0])), frozenset(term.names))[name]
    assert none == 0 and none.requires_grad
