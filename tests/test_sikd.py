"SIKD: the averages against the equation, what teacher and student read, the feature term, bad input."
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from torch.utils.data import DataLoader

from medkd.core import Taps, tap_shapes
from medkd.data.base import Splits, collate
from medkd.losses.sikd import SIKD, averaged, classwise_mean, mean_of_pixels
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit
from medkd.trainers.objective import Predictor, Teacher

SHAPES = [(2, 1, 7, 9), (3, 2, 16, 16), (2, 2, 5, 6, 7), (1, 1, 1, 1)]


def by_equation(image, label, num_classes):
    "Loops over images, channels and classes."
    out = image.clone()
    for n in range(image.shape[0]):
        for c in range(image.shape[1]):
            for k in range(num_classes):
                region = label[n] == k
                if region.any(): out[n, c][region] = image[n, c][region].sum() / (region.sum() + 1e-8)
    return out


def example(shape, low=0, high=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=rng)
    return image, torch.randint(low, high, (shape[0], *shape[2:]), generator=rng)


# averages ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("span", [(0, 4), (0, 1), (3, 4), (-2, 6), (255, 256), (2, 4)])
def test_equation(shape, span):
    image, label = example(shape, *span)
    expected = by_equation(image.double(), label, 4)
    torch.testing.assert_close(classwise_mean(image, label, 4).double(), expected, rtol=0, atol=1e-6)
    flat = mean_of_pixels(image.flatten(2), label.flatten(1), 4).view(shape)
    torch.testing.assert_close(flat.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(image, example(shape, *span)[0]), "the image that was given is not changed"


def test_labels_beyond_the_classes_stay():
    image, label = example((2, 3, 8, 8), 0, 3)
    label[:, 2:4] = 255
    label[:, 5] = -1
    mean = classwise_mean(image, label, 3)
    assert torch.equal(mean[:, :, 2:4], image[:, :, 2:4]) and torch.equal(mean[:, :, 5], image[:, :, 5])
    kept = torch.tensor([0, 1, 4, 6, 7])
    torch.testing.assert_close(mean[:, :, kept], classwise_mean(image[:, :, kept], label[:, kept], 3))


def test_background_alone():
    image, label = example((3, 1, 8, 8), 0, 1)
    torch.testing.assert_close(classwise_mean(image, label, 9), image.mean((2, 3), keepdim=True).expand_as(image))


def test_a_batch_is_its_images():
    image, label = example((5, 2, 9, 4))
    alone = torch.cat([classwise_mean(image[n:n + 1], label[n:n + 1], 4) for n in range(5)])
    assert torch.equal(classwise_mean(image, label, 4), alone)
    assert classwise_mean(image[:0], label[:0], 4).shape == (0, 2, 9, 4)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_integer_types_of_labels(kind):
    image, label = example((2, 1, 6, 6), 0, 2)
    assert torch.equal(classwise_mean(image, label.to(kind), 2), classwise_mean(image, label, 2))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_type_and_layout_of_the_image_stay(kind):
    image, label = example((2, 3, 64, 64))
    given = (image + 50).to(kind).contiguous(memory_format=torch.channels_last)
    mean = classwise_mean(given, label, 4)
    assert mean.dtype == kind and mean.is_contiguous(memory_format=torch.channels_last)
    expected = by_equation(given.double(), label, 4)
    torch.testing.assert_close(mean.double(), expected, rtol=torch.finfo(kind).eps, atol=1e-6)


def test_large_regions_are_exact():
    image = 1000 + torch.rand(1, 1, 600, 600)
    mean = classwise_mean(image, torch.zeros(1, 600, 600, dtype=torch.long), 1)
    assert mean[0, 0, 0, 0].item() == pytest.approx(image.double().mean().item(), rel=1e-6)


def test_labels_of_another_size():
    image, label = example((2, 1, 8, 12))
    small = label[:, ::2, ::2]
    assert torch.equal(classwise_mean(image, small, 4),
                       classwise_mean(image, small.repeat_interleave(2, 1).repeat_interleave(2, 2), 4))


def test_gradient_is_the_averaged_gradient():
    image, label = example((2, 2, 5, 5), -1, 3)
    image = image.double().requires_grad_()
    upstream = torch.randn(image.shape, dtype=torch.float64)
    gradient, = torch.autograd.grad(classwise_mean(image, label, 3), image, upstream)
    torch.testing.assert_close(gradient, by_equation(upstream, label, 3))


@pytest.mark.parametrize("shape,kind", [((2, 1, 6, 6), torch.long), ((3, 6, 6), torch.long), ((2, 6, 6), torch.float32)])
def test_labels_that_cannot_be(shape, kind):
    with pytest.raises(ValueError, match=r"expected an image \(B,C,\*S\) and integer labels"):
        classwise_mean(torch.zeros(2, 1, 6, 6), torch.zeros(shape, dtype=kind), 2)


# what the networks read ----------------------------------------------------------------------------

def batch_of(labelled=None):
    batch = collate([toy.squares().train[i] for i in range(3)])
    return batch | ({} if labelled is None else dict(labelled=torch.tensor(labelled)))


def test_averaged_reads_the_batch():
    batch = batch_of()
    assert torch.equal(averaged(batch), classwise_mean(batch["image"], batch["label"], 2))
    assert torch.equal(averaged(batch_of([True] * 3)), averaged(batch))
    with pytest.raises(ValueError, match="but case0-1 have no annotation"): averaged(batch_of([True, False, True]))


def test_oracle_is_shown_averages_and_its_student_images():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.cat([x, -x], 1)
    batch, show = batch_of(), partial(averaged, num_classes=2)
    Teacher(Net(), show=show).taps(batch)
    assert torch.equal(seen[0], averaged(batch))
    oracle, student = Predictor(Net(), student_input=show), Predictor(Net(), Teacher(Net(), show=show))
    assert torch.equal(oracle.input(batch), averaged(batch)) and torch.equal(student.input(batch), batch["image"])


# the term ------------------------------------------------------------------------------------------

def built(student, teacher):
    term = SIKD()
    term.build(dict(head_in=tuple(student.shape)), dict(head_in=tuple(teacher.shape)))
    loss = term(Taps(dict(head_in=student)), Taps(dict(head_in=teacher)), {}, frozenset(["sikd"]))["sikd"]
    return term, loss


def test_published_pair_has_equal_features():
    shapes = [tap_shapes(build(name, 1, 4, width=.125), (2, 1, 32, 48), ["head_in"]) for name in ("unet", "unet_noskip")]
    assert shapes[0] == shapes[1] and shapes[0]["head_in"] == (2, 8, 32, 48)


@pytest.mark.parametrize("size", [(4, 6), (3, 4, 5)])
def test_mean_squared_difference(size):
    a, b = torch.randn(2, 2, 3, *size)
    a.requires_grad_(), b.requires_grad_()
    term, loss = built(a, b)
    assert not list(term.parameters()) and loss.item() == pytest.approx(((a - b) ** 2).sum().item() / a.numel(), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(a.grad, 2 * (a - b).detach() / a.numel())
    assert b.grad is None


def test_features_of_other_shapes():
    a, b = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 5, 16, 16)
    term, loss = built(a, b)
    halves = F.interpolate(b, (8, 8), mode="bilinear")
    assert loss.item() == pytest.approx(F.mse_loss(term.adapt(a), halves).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in term.parameters()) and a.grad.abs().max() > 0


# training ------------------------------------------------------------------------------------------

net = partial(build, "unet", 1, 2, .125)
alone = Recipe(data=toy.squares, student=net, terms=(partial(Seg, F.cross_entropy),), weights=dict(seg=1), steps=6,
               batch_size=4, optimiser=torch.optim.Adam, precision="fp32")
show = partial(averaged, num_classes=2)
oracle = replace(alone, student=partial(build, "unet_noskip", 1, 2, .125), student_input=show)


def distilled(teacher):
    return replace(alone, teacher=teacher, teacher_input=show, terms=(*alone.terms, SIKD), weights=dict(seg=1, sikd=2.))


def test_both_stages(tmp_path):
    teacher = fit(oracle, tmp_path/"teacher")
    run = fit(distilled(teacher), tmp_path/"student")
    rows = run.metrics("train")
    assert len(rows) == 6 and all(row["losses"]["sikd"] > 0 for row in rows)
    assert teacher.network().state_dict().keys() == run.network().state_dict().keys()
    score = teacher.metrics("val")[-1]["scores"]["dice"]
    loader = DataLoader(toy.squares().val, batch_size=1, collate_fn=collate)
    predictor = Predictor(teacher.network(), student_input=show)
    assert alone.validate(predictor, loader)["dice"] == pytest.approx(score, abs=1e-6)


def test_unlabelled_images_stop_the_training(tmp_path):
    class Half(toy.Squares):
        def __getitem__(self, i): return super().__getitem__(i) | dict(labelled=bool(i % 2))
    whole = toy.squares()
    splits = Splits("half", Half(8, 0), whole.val, whole.test, whole.classes, "0" * 64)
    with pytest.raises(ValueError, match="have no annotation"): fit(replace(oracle, data=splits), tmp_path/"run")


def test_random_labels_of_every_kind_agree_with_numpy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        classes, size = int(rng.integers(1, 6)), tuple(rng.integers(1, 9, rng.integers(1, 4)))
        image = torch.from_numpy(rng.normal(size=(2, 2, *size)).astype(np.float32))
        label = torch.from_numpy(rng.integers(-1, classes + 1, (2, *size)))
        torch.testing.assert_close(classwise_mean(image, label, classes).double(),
                                   by_equation(image.double(), label, classes), rtol=0, atol=1e-6)
