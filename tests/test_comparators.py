"""The comparators of ACF-BCKD against their equations as published, written out in float64."""
from functools import partial

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
import toy

from medkd.losses.acf_bckd import hard_boundary
from medkd.losses.at import AT, at
from medkd.losses.cirkd import CIRKD, ClassQueue, Memory, SimilarityKL, minibatch, pooled, units
from medkd.losses.ifvd import IFVD, ifvd
from medkd.losses.logits import (DKD, NKD, cwd, dist, dkd, kd_kl, kd_sigmoid_mse, nkd)
from medkd.losses.skd import SKD, pairwise, pixelwise
from medkd.losses.task import class_masks, dice_ce

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


FEATURES = {
    "at": at, "at, 4": partial(at, p=4), "skd, pairs": pairwise, "skd, pixels": pixelwise, "skd, pixels, masks": partial(pixelwise, multi_label=True),
    "skd, as published": partial(pixelwise, multi_label=True, overlap="as_published"), "minibatch": minibatch,
    "ifvd": lambda s, t: ifvd(s, t, torch.zeros(1, 2, 2, 2, dtype=torch.long), 3), "ifvd, no mask": lambda s, t: ifvd(s, t, torch.zeros(1, 3, 2, 2, 2), 3),
    "dkd, masks": lambda s, t: dkd(s, t, (t > 0).long()), "dkd, no mask": lambda s, t: dkd(s, t, torch.zeros(1, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", ["wrong", "right", "flat", "both", "random"])
@pytest.mark.parametrize("name", FEATURES)
def test_features_and_masks_are_finite_for_any_size(name, kind):
    student, teacher, _ = confident(kind)
    for student, teacher in ((student, teacher), (teacher, student)):
        value, gradient = value_and_gradient(lambda s: FEATURES[name](s, teacher), student)
        assert value.isfinite() and gradient.isfinite().all()


def test_dkd_masks_what_no_subtraction_masks():
    "A student that is sure of the label: 1000 / tau would not take it out."
    student = torch.tensor([9000., 1., 0.]).view(1, 3, 1, 1)
    teacher = torch.tensor([5., 0., 2.]).view(1, 3, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    others = kd_kl(student[:, 1:], teacher[:, 1:], 4.)
    torch.testing.assert_close(dkd(student, teacher, label, alpha=0., beta=1.), others)


def test_a_label_map_with_an_axis_of_its_own_is_refused():
    "(B,1,*S), as MONAI has it, is no mask for each class."
    student, teacher, label = logits((2, 3, 4, 4))
    for loss in (dkd, partial(ifvd, num_classes=3), partial(hard_boundary, multi_label=True), lambda s, t, y: dice_ce(s, y)):
        with pytest.raises(ValueError, match=r"label \(2, 1, 4, 4\) for 3 classes: expected class numbers"): loss(student, teacher, label[:, None])


@pytest.mark.parametrize("cls", [DKD, NKD, IFVD])
def test_only_labelled_anchors_count(cls):
    term, student, teacher, batch = cls.example(3, 3)
    name, = term.names
    both = term(student, teacher, batch, frozenset(term.names))[name]
    one = [term(student, teacher, batch | dict(view=torch.tensor(view)), frozenset(term.names))[name] for view in ([0, 1], [1, 0])]
    torch.testing.assert_close(sum(one) / 2, both)
    none = term(student, teacher, batch | dict(labelled=torch.tensor([0, 0])), frozenset(term.names))[name]
    assert none == 0 and none.requires_grad


# features
def feature(channels, size, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, generator=rng, dtype=torch.float64)


def blocks(size, classes=4, seed=0):
    "A label (2,*size) of 2-blocks, all classes there, with one value beyond them."
    coarse = torch.randint(-1, classes, (2, *(-(-n // 2) for n in size)), generator=torch.Generator().manual_seed(seed))
    coarse.view(2, -1)[:, :classes] = torch.arange(classes)
    for axis, n in enumerate(size, 1): coarse = coarse.repeat_interleave(2, axis).narrow(axis, 0, n)
    return coarse


PAIRS = {"2-D": ((6, 8), (6, 8)), "2-D, larger teacher": ((6, 8), (12, 16)), "3-D": ((4, 6, 4), (4, 6, 4)),
         "3-D, smaller teacher": ((4, 6, 8), (2, 3, 4))}
SIZES = pytest.mark.parametrize("size,other", PAIRS.values(), ids=PAIRS)


def plain_attention(student, teacher):
    def energy(x):
        x = F.interpolate(x, student.shape[2:], mode="nearest").square().mean(1).flatten(1)
        return x / x.norm(dim=1, keepdim=True)
    return (energy(student) - energy(teacher)).square().mean()


@SIZES
def test_at(size, other):
    student, teacher = feature(5, size, 0), feature(3, other, 1)
    assert_same(lambda s: at(s, teacher), lambda s: plain_attention(s, teacher), student)


def test_at_sums_the_seven_pairs_of_the_paper():
    names = ("e1", "e2", "e3", "e4", "d3", "d2", "out")
    taps = [{name: feature(3 + i, (6, 8), 10 * j + i) for i, name in enumerate(names)} for j in (0, 1)]
    total = AT(names)(*taps, {}, frozenset(["at"]))["at"]
    torch.testing.assert_close(total, sum(plain_attention(taps[0][name], taps[1][name]) for name in names))


def plain_similarity(x, label, classes):
    centres = x.clone()
    for b in range(len(x)):
        for k in range(classes):
            here = label[b] == k
            if here.any(): centres[b][:, here] = (x[b][:, here].sum(1) / (here.sum() + 1e-6))[:, None]
    return F.cosine_similarity(x, centres, dim=1)


def plain_ifvd(student, teacher, label, classes):
    teacher = F.interpolate(teacher, student.shape[2:], mode="nearest")
    label = F.interpolate(label[:, None].double(), student.shape[2:], mode="nearest")[:, 0]
    return (plain_similarity(student, label, classes) - plain_similarity(teacher, label, classes)).square().mean()


@SIZES
def test_ifvd(size, other):
    student, teacher, label = feature(5, size, 0), feature(7, other, 1), blocks([2 * n for n in size])
    assert_same(lambda s: ifvd(s, teacher, label, 4), lambda s: plain_ifvd(s, teacher, label, 4), student)
    assert_same(lambda s: ifvd(s, teacher, label, 2), lambda s: plain_ifvd(s, teacher, label, 2), student)


def test_ifvd_in_float32():
    student, teacher, label = feature(5, (4, 6, 4), 0), feature(7, (4, 6, 4), 1), blocks((4, 6, 4))
    assert_same(lambda s: ifvd(s, teacher.to(s.dtype), label, 4), lambda s: plain_ifvd(s, teacher, label, 4), student, torch.float32)


def test_ifvd_of_overlapping_classes():
    student, teacher = feature(5, (6, 8), 0), feature(5, (6, 8), 1)
    masks = feature(3, (6, 8), 2) > 0
    parts = lambda s, t, i: plain_ifvd(s, t, masks[:, i].long() - 1, 1) # the mask is class 0, the rest of no class
    assert_same(lambda s: ifvd(s, teacher, masks.long(), 3), lambda s: sum(parts(s, teacher, i) for i in range(3)) / 3, student)
    value, gradient = value_and_gradient(lambda s: ifvd(s, teacher, masks, 3, one_channel=True), student)
    alone = sum(parts(student[:, i:i + 1], teacher[:, i:i + 1], i) for i in range(3)) / 3
    torch.testing.assert_close(value, alone)
    assert value > .01 and gradient.abs().max() < 1e-9


def test_dead_features_have_finite_gradients():
    label, dead = blocks((4, 4)), torch.zeros(2, 3, 4, 4)
    for loss in (lambda s: ifvd(s, feature(3, (4, 4), 1).float(), label, 4), lambda s: minibatch(s, feature(3, (4, 4), 1).float()),
                 lambda s: at(s, dead)):
        value, gradient = value_and_gradient(loss, dead)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=["2-D", "3-D"])
def test_skd_of_overlapping_classes(shape):
    student, teacher, _ = logits(shape)
    p_t, count = teacher.sigmoid(), teacher[0].numel()
    cross = lambda s: -(p_t * s.sigmoid().log() + (1 - p_t) * (1 - s.sigmoid()).log()).sum() / count
    product = lambda s: (p_t * s.sigmoid()).sum() / count
    for form, plain in dict(cross_entropy=cross, as_published=product).items():
        assert_same(lambda s: pixelwise(s, teacher, "reference", multi_label=True, overlap=form), plain, student)
        term = SKD("f", multi_label=True, reduction="reference", overlap=form)
        found = term(dict(f=None, out=student), dict(f=None, out=teacher), {}, frozenset(["pixelwise"]))
        torch.testing.assert_close(found["pixelwise"], plain(student))


# CIRKD
def plain_units(x):
    pool = {4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim]
    return F.normalize(pool(x, 2, 2, ceil_mode=True), dim=1).flatten(2)


def plain_minibatch(student, teacher, tau=1.):
    x, y = plain_units(student), plain_units(F.interpolate(teacher, student.shape[2:], mode="nearest"))
    parts = [kl((x[i].T @ x[j] / tau).log_softmax(1), (y[i].T @ y[j] / tau).softmax(1)) for i in range(len(x)) for j in range(len(x))]
    return sum(parts) / len(x) ** 2 / x.shape[2]


@pytest.mark.parametrize("tau", [1., .3])
@SIZES
def test_minibatch(size, other, tau):
    student, teacher = feature(5, size, 0), feature(7, other, 1)
    assert_same(lambda s: minibatch(s, teacher, tau), lambda s: plain_minibatch(s, teacher, tau), student)


def test_minibatch_of_odd_sizes_in_float32():
    student, teacher = feature(16, (7, 5, 6), 0), feature(24, (7, 5, 6), 1)
    assert_same(lambda s: minibatch(s, teacher.to(s.dtype)), lambda s: plain_minibatch(s, teacher), student, torch.float32)


def test_chunks_of_the_pairwise_map_change_nothing():
    x, y = units(feature(5, (40,), 0)), units(feature(7, (40,), 1))
    assert_same(lambda x: SimilarityKL.apply(x, y, .5, 1), lambda x: SimilarityKL.apply(x, y, .5, 2 ** 20), x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        SimilarityKL.apply(x.requires_grad_(), y, .5, 1)
    assert kept == [x.shape]


def published(**options):
    "CIRKD on 4 classes, 5 and 7 channels, whose memory compares with all that the queues hold."
    torch.manual_seed(0)
    term = CIRKD("head_in", pixels=40, regions=40, sampled=40, **options)
    term.build(dict(out=(2, 4, 8, 8), head_in=(2, 5, 8, 8)), dict(head_in=(2, 7, 8, 8)))
    return term.double()


def run(term, student, teacher, label, active=("minibatch", "pixel", "region")):
    return term(dict(head_in=student, out=torch.zeros(2, 4)), dict(head_in=teacher), dict(label=label), frozenset(active))


def test_memory_is_the_divergence_to_what_the_queues_hold():
    term, student, teacher, label = published(), feature(5, (8, 8), 0), feature(7, (8, 8), 1), blocks((8, 8))
    found = run(term, student, teacher, label)
    torch.testing.assert_close(found["minibatch"], plain_minibatch(student, teacher))
    x, y = F.normalize(term.memory.project(pooled(student)), dim=1), plain_units(teacher)
    foreground = (label[:, ::2, ::2] > 0).flatten(1)
    x, y = x.transpose(1, 2)[foreground], y.transpose(1, 2)[foreground]
    for name, queue in (("pixel", term.memory.pixel), ("region", term.memory.region)):
        keys = queue.queue.flatten(0, 1).T
        expected = kl((x @ keys / .1).log_softmax(1), (y @ keys / .1).softmax(1)) / len(x)
        torch.testing.assert_close(found[name], expected)


def stored(queue, k): return queue.queue[k, :queue.next[k]]


def is_among(rows, of): return (rows[:, None] - of).abs().amax(2).amin(1) < 1e-12


def test_keys_are_the_teachers_vectors_of_the_class():
    term, teacher, label = published(), feature(7, (8, 8), 1), blocks((8, 8))
    first = term.memory.pixel.queue.clone()
    run(term, feature(5, (8, 8), 0), teacher, label)
    y, small = plain_units(teacher).transpose(1, 2), label[:, ::2, ::2].flatten(1)
    for k in (1, 2, 3):
        there = [y[b][small[b] == k] for b in (0, 1)]
        means = torch.stack([F.normalize(rows.mean(0), dim=0) for rows in there])
        torch.testing.assert_close(stored(term.memory.region, k), means)
        assert len(stored(term.memory.pixel, k)) == sum(min(16, len(rows)) for rows in there)
        assert is_among(stored(term.memory.pixel, k), torch.cat(there)).all()
    assert torch.equal(term.memory.pixel.queue[0], first[0]) and not term.memory.pixel.next[0]
    as_released = published(positions_by_rank=True)
    run(as_released, feature(5, (8, 8), 0), teacher, label)
    assert not all(is_among(stored(as_released.memory.pixel, k), y[small == k]).all() for k in (1, 2, 3))


def test_no_more_than_16_pixels_of_a_class():
    term, label = published(), torch.ones(2, 12, 12, dtype=torch.long)
    run(term, feature(5, (12, 12), 0), feature(7, (12, 12), 1), label)
    assert term.memory.pixel.next.tolist() == [0, 32, 0, 0] and term.memory.region.next.tolist() == [0, 2, 0, 0]


def test_without_foreground_memory_is_zero():
    term, student = published(), feature(5, (8, 8), 0).requires_grad_()
    found = run(term, student, feature(7, (8, 8), 1), torch.zeros(2, 8, 8, dtype=torch.long))
    assert found["pixel"] == found["region"] == 0
    sum(found.values()).backward()
    assert student.grad.isfinite().all() and all(not p.grad.any() for p in term.parameters())
    unlabelled = dict(label=torch.ones(2, 8, 8).long(), labelled=torch.zeros(2))
    none = term(dict(head_in=student, out=None), dict(head_in=student), unlabelled, frozenset(["pixel"]))["pixel"]
    assert none == 0 and none.requires_grad


def test_only_the_first_image_with_itself():
    term, student, teacher, label = published(first_only=True), feature(5, (8, 8), 0), feature(7, (8, 8), 1), blocks((8, 8))
    found = run(term, student, teacher, label, ["minibatch"])
    assert list(found) == ["minibatch"]
    torch.testing.assert_close(found["minibatch"], plain_minibatch(student[:1], teacher[:1]))


def test_overlapping_classes_have_no_memory():
    masks = feature(4, (8, 8), 2) > 0
    with pytest.raises(ValueError, match="memory=False"): run(published(), feature(5, (8, 8), 0), feature(7, (8, 8), 1), masks)
    term = CIRKD("head_in", memory=False)
    term.build(dict(head_in=(2, 5, 8, 8)), dict(head_in=(2, 7, 8, 8)))
    assert list(run(term, feature(5, (8, 8), 0), feature(7, (8, 8), 1), masks)) == ["minibatch"] == list(term.names)


def test_a_group_that_does_not_fit_goes_to_the_end():
    queue, rows = ClassQueue(2, 5, 2), torch.arange(6.).view(3, 2)
    queue.push([1], [rows], rows)
    queue.push([1], [10 + rows], rows)
    assert torch.equal(queue.queue[1], torch.cat([rows[:2], 10 + rows])) and queue.next.tolist() == [0, 0]


def test_queues_are_part_of_the_state():
    names = set(published().state_dict())
    assert {f"memory.{queue}.{part}" for queue in ("pixel", "region") for part in ("queue", "next")} <= names


def example_of(rank):
    "What a process sees: pooled features of student and teacher, masks; no image on process 2."
    rng = torch.Generator().manual_seed(rank)
    images = 0 if rank == 2 else 1
    label = torch.randint(0, 3, (images, 12), generator=rng)
    return (torch.randn(images, 3, 12, generator=rng), units(torch.randn(images, 4, 12, generator=rng)), class_masks(label, 3, (12,)))


def remember(*examples):
    "The state of a memory after two steps on these."
    torch.manual_seed(0)
    memory = Memory(3, 4, 3, pixels=30, regions=6, sampled=4)
    for _ in range(2): memory(*map(torch.cat, zip(*examples)))
    return memory.state_dict()


def remember_on(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    torch.save(remember(example_of(rank)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_queues_hold_the_keys_of_all_processes(tmp_path):
    children = [toy.in_child(remember_on, rank, tmp_path) for rank in range(3)]
    assert [toy.exit_code(child) for child in children] == [0, 0, 0]
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3))
    for name in first:
        if name.endswith(("queue", "next")): assert all(torch.equal(first[name], other[name]) for other in others), name
    alone = remember(example_of(0), example_of(1), example_of(2))
    for name in ("region.queue", "region.next", "pixel.next"): torch.testing.assert_close(first[name], alone[name])
    _, vectors, masks = example_of(1)
    for k in (1, 2):
        pixels = first["pixel.queue"][k, :first["pixel.next"][k]]
        assert is_among(pixels, vectors[0][masks[0, k]]).sum() >= 2, "none of process 1"
