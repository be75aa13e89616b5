"""Metrics against MONAI, MedPy and scikit-learn, and the properties every distance must have."""
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medkd.metrics import (CaseScores, Confusion, assd, auc, confusion, dice, dice_masks, hd95, iou,
                           nsd, surface_scores)
from medkd.surface import surface_distances

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES = [((40, 52), (1., 1.)), ((61, 33), (.4, 1.7)), ((14, 25, 22), (1., 1., 1.)),
          ((12, 30, 28), (3., .7, .7)), ((25, 9, 18), (.5, 6., 1.3))]


@pytest.fixture(scope="module")
def monai():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai import metrics
    return metrics


@pytest.fixture(scope="module")
def medpy():
    from medpy.metric import binary
    return binary


def blobs(shape, seed, apart=.4, cut=.6):
    "Two smooth random masks that resemble each other, both non-empty."
    rng = np.random.default_rng(seed)
    noise = [gaussian_filter(rng.standard_normal(shape), 2.5) for _ in range(2)]
    fields = (noise[0], (1 - apart) * noise[0] + apart * noise[1])
    masks = [field > np.quantile(field, cut) for field in fields]
    assert all(mask.any() and not mask.all() for mask in masks)
    return masks


def one_hot(*masks):
    return [torch.from_numpy(mask)[None, None] for mask in masks]


def single(shape, *position):
    mask = np.zeros(shape, bool)
    mask[position] = True
    return mask


def border(shape):
    "Everything but a corner: the surface is the image's border and the corner's."
    mask = np.ones(shape, bool)
    mask[tuple(slice(0, 4) for _ in shape)] = False
    return mask


def pairs():
    "Pairs of masks with a name each."
    for shape, spacing in SHAPES:
        for seed, apart in enumerate((.1, .4, .9)):
            yield pytest.param(*blobs(shape, seed, apart), spacing, id=f"blobs-{shape}-{apart}")
        yield pytest.param(*blobs(shape, 7, cut=.97), spacing, id=f"sparse-{shape}")
        yield pytest.param(border(shape), blobs(shape, 3)[0], spacing, id=f"border-{shape}")
        yield pytest.param(border(shape), ~border(shape), spacing, id=f"touching-{shape}")
        far = single(shape, *(s - 1 for s in shape))
        yield pytest.param(single(shape, *(0 for _ in shape)), far, spacing, id=f"corners-{shape}")
        yield pytest.param(far, blobs(shape, 4)[1], spacing, id=f"single-{shape}")
        yield pytest.param(np.ones(shape, bool), far, spacing, id=f"full-{shape}")


@pytest.mark.parametrize("pred, label, spacing", [*pairs()])
def test_surface_scores_equal_monai_and_medpy(pred, label, spacing, monai, medpy):
    ours, pair = surface_scores(pred, label, spacing, tolerance=1.5), one_hot(pred, label)
    theirs = dict(
        hd95=monai.compute_hausdorff_distance(*pair, True, percentile=95, spacing=spacing).item(),
        hd95_pooled=medpy.hd95(pred, label, spacing),
        assd=monai.compute_average_surface_distance(*pair, True, True, spacing=spacing).item(),
        nsd=monai.compute_surface_dice(*pair, [1.5], True, spacing=spacing).item())
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert ours["assd"] == pytest.approx(medpy.assd(pred, label, spacing), rel=1e-9)


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_single_functions_equal_surface_scores(shape, spacing):
    pred, label = blobs(shape, 5)
    scores = surface_scores(pred, label, spacing, tolerance=.9)
    assert scores == dict(hd95=hd95(pred, label, spacing), assd=assd(pred, label, spacing),
                          hd95_pooled=hd95(pred, label, spacing, definition="pooled"),
                          nsd=nsd(pred, label, spacing, tolerance=.9))
    tensors = surface_scores(torch.from_numpy(pred).byte(), torch.from_numpy(label), spacing, .9)
    assert tensors == scores


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_distance_properties(shape, spacing):
    pred, label = blobs(shape, 6)
    forward, backward = surface_distances(pred, label, spacing)
    swapped = surface_distances(label, pred, spacing)
    assert np.array_equal(forward, swapped[1]) and np.array_equal(backward, swapped[0])
    scores, mirrored = (surface_scores(*pair, spacing) for pair in ((pred, label), (label, pred)))
    assert mirrored == pytest.approx(scores)
    assert surface_scores(pred, pred, spacing) == dict(hd95=0, hd95_pooled=0, assd=0, nsd=1)
    double = surface_scores(pred, label, [2 * s for s in spacing], tolerance=2.)
    for name in ("hd95", "hd95_pooled", "assd"):
        assert double[name] == pytest.approx(2 * scores[name])
    assert double["nsd"] == scores["nsd"]
    turned = surface_scores(pred.T, label.T, spacing[::-1])
    assert turned == pytest.approx(scores)


@pytest.mark.parametrize("shape, spacing", SHAPES)
def test_the_image_around_the_masks_does_not_matter(shape, spacing):
    pred, label = blobs(shape, 8)
    wide = [np.pad(mask, 9) for mask in (pred, label)]
    assert surface_scores(*wide, spacing) == surface_scores(pred, label, spacing)


@pytest.mark.parametrize("spacing", [(1., 1., 1.), (100., 1., 1.), (.01, 1., 3.), (1e-3, 1e-3, 1.)])
def test_distances_are_exact_for_extreme_spacings(spacing):
    from scipy.ndimage import binary_erosion, distance_transform_edt
    pred, label = blobs((10, 40, 40), 9, apart=.9, cut=.9)
    edges = [mask ^ binary_erosion(mask) for mask in (pred, label)]
    expected = distance_transform_edt(~edges[1], spacing)[edges[0]]
    assert np.sort(surface_distances(pred, label, spacing)[0]) == pytest.approx(np.sort(expected))


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_mask_is_never_dropped_silently(missed, monai):
    blob, nothing = blobs((12, 30, 28), 0)[0], np.zeros((12, 30, 28), bool)
    pair, spacing = ((nothing, blob) if missed else (blob, nothing)), (3., 1., 1.)
    diagonal = np.linalg.norm((36, 30, 28))
    assert surface_scores(*pair, spacing) == pytest.approx(
        dict(hd95=diagonal, hd95_pooled=diagonal, assd=diagonal, nsd=0))
    assert diagonal > max(hd95(blob, single(blob.shape, 0, 0, 0), spacing),
                          hd95(blob, single(blob.shape, 11, 29, 27), spacing))
    assert hd95(*pair, spacing, empty="inf") == assd(*pair, spacing, empty="inf") == np.inf
    assert np.isnan([hd95(*pair, empty="nan"), assd(*pair, empty="nan")]).all()
    assert torch.isnan(monai.compute_hausdorff_distance(*one_hot(*pair), True, percentile=95)).all()
    assert monai.compute_surface_dice(*one_hot(*pair), [1.], True).item() == nsd(*pair) == 0


def test_both_empty_is_nan():
    nothing = np.zeros((5, 6), bool)
    for empty in ("worst", "inf", "nan"):
        assert np.isnan([*surface_scores(nothing, nothing, empty=empty).values()]).all()


BAD = [
    (dict(pred=np.full((4, 4), 2)), "pred holds 2..2"),
    (dict(label=np.full((4, 4), .5)), "label holds 0.5..0.5"),
    (dict(label=np.ones((4, 5), bool)), "one shape"),
    (dict(spacing=(1.,)), "does not fit 2 axes"),
    (dict(spacing=(1., 0.)), "positive"),
    (dict(spacing=(1., float("nan"))), "positive"),
    (dict(empty="zero"), "'worst', 'inf', 'nan'"),
    (dict(tolerance=-1.), "tolerance"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        surface_scores(**{"pred": np.eye(4), "label": np.eye(4, dtype=bool), **change})


@pytest.mark.parametrize("shape", [(3, 40, 30), (2, 14, 12, 10)])
@pytest.mark.parametrize("num_classes", [2, 4, 17])
def test_dice_and_iou_equal_monai(shape, num_classes, monai):
    generator = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, num_classes, shape, generator=generator) for _ in range(2))
    label[0][label[0] == num_classes - 1] = 0
    maps = [torch.nn.functional.one_hot(m, num_classes).movedim(-1, 1) for m in (pred, label)]
    expected = monai.compute_dice(*maps, include_background=False, ignore_empty=False)
    assert torch.allclose(dice(pred, label, num_classes), expected)
    expected = monai.compute_iou(*maps, include_background=False, ignore_empty=False)
    assert torch.allclose(iou(pred, label, num_classes), expected)
    masks = [m[:, 1:].bool() for m in maps]
    assert torch.allclose(dice_masks(*masks), dice(pred, label, num_classes))


def test_dice_is_nan_only_where_the_class_is_in_neither():
    pred, label = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1]])
    assert dice(pred, label, 4).isnan().tolist() == [[False, False, True]]
    assert dice(pred, label, 4)[0, 1] == iou(pred, label, 4)[0, 1] == 0


@pytest.mark.parametrize("label, message", [
    (torch.tensor([[0, 3]]), r"label holds 0\.\.3, expected 0\.\.1"),
    (torch.tensor([[0, -1]]), r"label holds -1\.\.0"),
    (torch.tensor([[0., 1.]]), "integers"), (torch.tensor([[0, 1, 1]]), "one shape")])
def test_wrong_label_maps_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        dice(torch.tensor([[0, 1]]), label, 2)


def test_confusion_scores_equal_scikit_learn():
    from sklearn import metrics as sk
    pred, label = blobs((50, 60), 1)
    fov = np.random.default_rng(0).random((50, 60)) < .8
    p, t = pred[fov], label[fov]
    counts = confusion(torch.from_numpy(pred), label, fov)
    assert counts == Confusion(*(int(c) for c in (
        (p & t).sum(), (p & ~t).sum(), (~p & t).sum(), (~p & ~t).sum())))
    assert counts.scores() == pytest.approx(dict(
        dice=sk.f1_score(t, p), iou=sk.jaccard_score(t, p),
        miou=sk.jaccard_score(t, p, average="macro"), sensitivity=sk.recall_score(t, p),
        specificity=sk.recall_score(~t, ~p), accuracy=sk.accuracy_score(t, p),
        precision=sk.precision_score(t, p), voe=1 - sk.jaccard_score(t, p),
        rvd=abs(p.sum() / t.sum() - 1)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_auc_equals_scikit_learn(dtype):
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    label = rng.random((90, 80)) < .15
    score = np.clip(100 + 30 * label + rng.normal(0, 25, label.shape), 0, 255).astype(dtype)
    fov = rng.random(label.shape) < .7
    exact = dict(rel=0, abs=1e-12)
    whole, inside = (roc_auc_score(label[m], score[m]) for m in (np.full_like(fov, True), fov))
    assert auc(score, label) == pytest.approx(whole, **exact)
    assert auc(score, label, fov) == pytest.approx(inside, **exact)
    assert auc(score, ~label) == pytest.approx(1 - whole, **exact)
    if dtype != np.int16:
        assert auc(torch.from_numpy(score), torch.from_numpy(label)) == auc(score, label)


def test_auc_without_one_class_or_with_nan():
    assert np.isnan(auc(np.arange(3.), np.zeros(3))) and np.isnan(auc(np.arange(3.), np.ones(3)))
    with pytest.raises(ValueError, match="NaN"):
        auc(np.array([0, np.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match="one shape"):
        auc(np.zeros(3), np.zeros(4))


def volume(seed, without=()):
    "A label map of three classes."
    rng = np.random.default_rng(seed)
    labels = np.digitize(gaussian_filter(rng.standard_normal((14, 24, 20)), 2), (.02, .06))
    for k in without:
        labels[labels == k] = 0
    return torch.from_numpy(labels)


def test_case_scores_of_volumes():
    table = CaseScores(("background", "liver", "tumour"), tolerance=2.)
    cases = dict(a=(volume(0), volume(1)), b=(volume(2, [2]), volume(3)),
                 c=(volume(4, [2]), volume(5, [2])))
    for case, (pred, label) in cases.items():
        table.add(case, pred, label, spacing=(3., 1., 1.))
    assert len(table.rows) == 6 and {row["unit"] for row in table.rows} == {"mm"}
    presence = [row["presence"] for row in table.rows]
    assert presence == ["both", "both", "both", "missed", "both", "absent"]
    for row in table.rows:
        pred, label = cases[row["case"]]
        k = table.classes.index(row["class"])
        scores = surface_scores(pred == k, label == k, (3., 1., 1.), tolerance=2.)
        scores |= dict(dice=dice(pred[None], label[None], 3)[0, k-1].item(),
                       iou=iou(pred[None], label[None], 3)[0, k-1].item())
        assert {m: row[m] for m in table.metrics} == pytest.approx(
            {m: scores[m] for m in table.metrics}, nan_ok=True)
        assert Confusion(*(row[c] for c in Confusion._fields)) == confusion(pred == k, label == k)
    rows = table.frame().set_index(["case", "class"])
    assert table.per_case("hd95")["c"] == rows.hd95["c", "liver"], "an absent class leaves the mean"
    expected = (rows.hd95["a", "tumour"] + np.linalg.norm((42, 24, 20))) / 2
    assert table.per_class("hd95")["tumour"] == pytest.approx(expected), "a missed one stays in it"
    assert table.mean()["dice"] == pytest.approx(rows.dice.groupby("case").mean().mean())


def test_case_scores_inside_a_field_of_view():
    rng = np.random.default_rng(0)
    label, score = rng.random((40, 50)) < .2, rng.integers(0, 256, (40, 50)).astype(np.uint8)
    fov = np.zeros((40, 50), bool)
    fov[5:30, 8:40] = True
    table = CaseScores(("background", "vessel"), metrics=("dice", "auc", "miou", "hd95"))
    table.add("x", torch.from_numpy(score >= 128), label, score=score, mask=fov)
    row, inside = table.rows[0], confusion(score >= 128, label, fov)
    assert (row["dice"], row["miou"]) == (inside.scores()["dice"], inside.scores()["miou"])
    assert row["auc"] == auc(score, label, fov) and row["unit"] == "px"
    assert row["hd95"] == hd95((score >= 128) & fov, label & fov)
    assert sum(row[c] for c in Confusion._fields) == fov.sum()


def test_case_scores_csv(tmp_path):
    import pandas
    table = CaseScores(("background", "vessel"), metrics=("dice", "precision"))
    table.add("a, with a comma", torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    table.add("b", torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    read = pandas.read_csv(table.write_csv(tmp_path / "scores.csv"))
    pandas.testing.assert_frame_equal(read, table.frame())
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


@pytest.mark.parametrize("change, message", [
    (dict(case="a"), "unique"), (dict(score=None), "needs score"),
    (dict(mask=np.ones((3, 2), bool)), "one shape"),
    (dict(pred=torch.full((2, 3), 2)), "expected 0..1"),
    (dict(label=torch.zeros(2, 4, dtype=int)), "one shape"),
    (dict(score=np.zeros((4, 4))), "one shape"), (dict(spacing=(1.,)), "does not fit")])
def test_a_refused_case_leaves_the_table_as_it_was(change, message):
    table = CaseScores(("background", "vessel"), metrics=("dice", "auc", "hd95"))
    good = dict(pred=torch.ones(2, 3, dtype=int), label=torch.tensor([[0, 1, 1], [0, 0, 1]]),
                score=np.ones((2, 3)))
    table.add("a", **good)
    with pytest.raises(ValueError, match=message):
        table.add(**{"case": "b", **good, **change})
    assert len(table.rows) == 1
    table.add("b", **good)
    assert len(table.rows) == 2
