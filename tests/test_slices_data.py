"Two-dimensional slice sets: volumes scored from stored slices; ACDC, Gastric and Synapse in official layout; unlabelled cases."
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import medkd.data as data
from medkd.data.acdc_files import find_acdc, inspect_frame
from medkd.data.base import data_root
from medkd.inference import read_prediction, read_volume, score_volumes, store_predictions
from medkd.metrics import dice
from medkd.papers import stored_scores
from medkd.surface import hd95


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("slices")
    data.phantom("chaos", root, ["1", "2", "5", "6"], (8, 64, 72))
    data.phantom("lits", root, ["0", "1", "28"], (8, 64, 72))
    return root


class Bright(torch.nn.Module):
    "Calls liver what is bright."
    def forward(self, image):
        return torch.cat([.5 - image, image - .5], 1) * 20


# volumes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["chaos", "lits"])
def test_volumes_are_scored_on_the_scanners_grid(name, twins, tmp_path):
    splits = data.load(f"phantom:{name}", twins, size=48)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    scores = score_volumes(folder, splits.test, splits.classes)
    assert [row["case"] for row in scores.rows] == list(splits.test.volumes) == list(dict.fromkeys(splits.test.patients))
    assert {row["unit"] for row in scores.rows} == {"mm"}
    for row in scores.rows:
        whole = splits.test.native(row["case"])
        pred = read_volume(folder, whole["cases"], whole["label"].shape)
        assert pred.shape == whole["label"].shape == (8, 64, 72) and pred.dtype == np.uint8
        assert row["dice"] == pytest.approx(dice(pred[None], whole["label"][None], 2).item())
        assert row["hd95"] == hd95(pred == 1, whole["label"] == 1, whole["spacing"])
    again = score_volumes(folder, splits.origin().test, splits.classes)
    assert again.rows == scores.rows, "the files alone decide"


def test_a_lower_threshold_finds_more(twins, tmp_path):
    splits = data.load("phantom:chaos", twins, size=48)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    found = [score_volumes(folder, splits.test, splits.classes, ["dice"], threshold=t).rows[0] for t in (.4, .5, .6)]
    positives = [row["tp"] + row["fp"] for row in found]
    assert positives[0] > positives[1] > positives[2]
    (folder / f"{splits.test.cases[0]}.png").unlink()
    with pytest.raises(FileNotFoundError, match="no stored prediction .*store_predictions"):
        score_volumes(folder, splits.test, splits.classes)


def test_papers_score_volumes(twins, tmp_path):
    class Stored:
        path = tmp_path
    splits = data.load("phantom:chaos", twins, size=48)
    store_predictions(Bright(), splits.test, tmp_path / "predictions/chaos", "0", splits.sha256)
    rows = stored_scores(dict(bright=Stored()), dict(chaos=splits), ("dice", "assd"), score_volumes)
    assert [(r["case"], r["patient"], r["metric"]) for r in rows] == [(p, p, m) for p in splits.test.volumes for m in ("dice", "assd")]
    slices = stored_scores(dict(bright=Stored()), dict(chaos=splits), ("dice",))
    assert [r["case"] for r in slices] == list(splits.test.cases)


# ACDC ----------------------------------------------------------------------------------------------

HEARTS = ["patient001", "patient002", "patient003", "patient021", "patient022", "patient032"]
TRAINING = "database/training"


@pytest.fixture(scope="session")
def hearts(tmp_path_factory):
    root = tmp_path_factory.mktemp("hearts")
    data.phantom("acdc", root, HEARTS, (6, 48, 40))
    return root


@pytest.fixture
def spoilt(hearts, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(hearts, tmp_path / "spoilt"))


def acdc(root, **options):
    return data.load("phantom:acdc", root, **dict(dict(size=32), **options))


def frame(root, patient="patient001", kind="", number="01"):
    return root / "ACDC" / TRAINING / patient / f"{patient}_frame{number}{kind}.nii.gz"


def found(name, root):
    return [(Path(problem.file).name, problem.kind) for problem in data.verify(f"phantom:{name}", root)]


def refused(name, root, *parts, **options):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(str, parts))):
        data.load(f"phantom:{name}", root, **options)


def resave(path, change):
    image = nibabel.load(path, mmap=False)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def test_hearts_are_in_order(hearts, tmp_path):
    splits = acdc(hearts)
    assert found("acdc", hearts) == []
    assert (splits.name, splits.phantom, splits.unit, splits.num_classes) == ("phantom-acdc", True, "mm", 4)
    assert [sorted(set(part.patients)) for part in (splits.train, splits.val, splits.test)] == [
        ["patient001", "patient003", "patient022"], ["patient002"], ["patient021", "patient032"]]
    assert len(splits.val) == 12 and len(splits.train) < 36, "all slices are scored, those with foreground train"
    again = data.phantom("acdc", tmp_path, HEARTS, (6, 48, 40))
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) == 6 * 6 + 1
    assert all((again / f).read_bytes() == (hearts / "ACDC" / f).read_bytes() for f in files)


def test_heart_slices_keep_the_order_of_the_file(hearts):
    splits = acdc(hearts, size=48)
    name, patient = next(iter(splits.test.volumes.items()))
    raw = nibabel.load(frame(hearts, patient)).get_fdata()
    mask = nibabel.load(frame(hearts, patient, "_gt")).get_fdata()
    low, high = np.percentile(raw, [2, 98])
    whole = splits.test.native(name)
    for k in range(raw.shape[2]):
        expected = ((np.clip(raw, low, high) - low) / (1e-10 + high - low))[:, :, k].T
        assert np.allclose(splits.test.scans[name]["image"][k], expected, atol=1e-6)
        assert np.array_equal(whole["label"][k], mask[:, :, k].T)
    assert np.allclose(whole["spacing"], nibabel.load(frame(hearts, patient)).header.get_zooms()[::-1])


def test_training_slices_repeat(hearts):
    train = acdc(hearts).train
    draw = lambda i, seed: train.sample(i, np.random.default_rng(seed))
    assert all(torch.equal(draw(i, 3)[key], draw(i, 3)[key]) for i in range(len(train)) for key in ("image", "label"))
    assert len({draw(0, seed)["image"].sum().item() for seed in range(12)}) > 6
    assert all(draw(i, 0)["label"].max() <= 3 and 0 <= draw(i, 0)["image"].min() <= draw(i, 0)["image"].max() <= 1 for i in range(9))


class Rings(torch.nn.Module):
    "Four classes from the grey value."
    def forward(self, image):
        return torch.cat([.2 - image, .05 - (image - .6).abs(), .1 - (image - .35).abs(), image - .9], 1) * 9


def test_hearts_are_scored_per_frame(hearts, tmp_path):
    splits = acdc(hearts)
    folder = store_predictions(Rings(), splits.test, tmp_path / "stored", "0", splits.sha256)
    for nearest in (False, True):
        scores = score_volumes(folder, splits.test, splits.classes, ["dice", "assd"], nearest=nearest)
        assert [row["case"] for row in scores.rows[::3]] == list(splits.test.volumes)
        assert [row["class"] for row in scores.rows[:3]] == list(splits.classes[1:]) and {row["unit"] for row in scores.rows} == {"mm"}
    item = splits.test[3]
    logits = Rings()(item["image"][None]).softmax(1)[0]
    assert np.array_equal(read_prediction(folder, item["case"]).argmax(0), logits.argmax(0).numpy())
    left = acdc(hearts, foreground=3)
    assert left.classes == ("background", "left ventricle") and left.num_classes == 2
    assert set(torch.cat([item["label"].flatten() for item in left.test]).tolist()) == {0, 1}


def test_without_info_distances_are_in_voxels(spoilt, capsys):
    for path in spoilt.glob(f"ACDC/{TRAINING}/*/Info.cfg"):
        path.unlink()
    splits = acdc(spoilt)
    assert splits.unit == "px" and "distances in voxels" in capsys.readouterr().out
    assert splits.test.native(next(iter(splits.test.volumes)))["spacing"] is None
    assert found("acdc", spoilt) == []


@pytest.mark.parametrize("kind", ["", "_gt"])
@pytest.mark.parametrize("length", [0, 40, .7])
def test_truncated_frame(kind, length, spoilt):
    path = frame(spoilt, kind=kind)
    path.write_bytes(path.read_bytes()[:length if length != .7 else int(path.stat().st_size * .7)])
    assert found("acdc", spoilt) == [(path.name, "damaged")]
    refused("acdc", spoilt, path.name, "cannot be read", "medkd verify phantom:acdc")


@pytest.mark.parametrize("kind, change, problem, text", [
    ("_gt", lambda x: x[:-1], "size", "its image"), ("_gt", lambda x: x + 1, "values", "expected 0 to 3"),
    ("_gt", lambda x: x * 0, "values", "nothing but background"), ("_gt", lambda x: x / 2, "values", "holds .0.5"),
    ("", lambda x: np.where(np.arange(len(x))[:, None, None] < 2, np.nan, x), "values", "576 voxels are not finite"),
    ("", lambda x: x * 0 + 5, "values", "every voxel is 5"), ("", lambda x: np.stack([x, x], -1), "damaged", "expected 3 axes")])
def test_frames_that_cannot_be_used(kind, change, problem, text, spoilt):
    path = frame(spoilt, kind=kind)
    resave(path, change)
    assert found("acdc", spoilt) == [(path.name, problem)]
    refused("acdc", spoilt, path.name, text)


def test_incomplete_patients(spoilt):
    frame(spoilt, "patient002", "_gt").unlink()
    assert found("acdc", spoilt) == [("patient002_frame01_gt.nii.gz", "missing")]
    refused("acdc", spoilt, "patient002_frame01_gt.nii.gz", "its segmentation is|its image is here")
    frame(spoilt, "patient002").unlink()
    assert found("acdc", spoilt) == [("patient002", "missing")]
    refused("acdc", spoilt, "patient002", "frames here: patient002_frame0.; expected ED and ES")
    shutil.rmtree(frame(spoilt, "patient002").parent)
    with pytest.raises(FileNotFoundError, match="patients patient002 are missing"):
        acdc(spoilt)


def test_info_that_does_not_fit(spoilt):
    info = frame(spoilt, "patient003").with_name("Info.cfg")
    info.write_text(info.read_text().replace("ED: 1", "ED: 9"))
    assert found("acdc", spoilt) == [("Info.cfg", "values")]
    info.write_text("")
    assert found("acdc", spoilt) == [("Info.cfg", "damaged")]
    info.unlink()
    assert found("acdc", spoilt) == [("Info.cfg", "missing")]
    refused("acdc", spoilt, "patient003/Info.cfg", "other patients have one")


def test_a_patient_whose_images_are_scored_does_not_train(spoilt, capsys):
    for role in ("", "_gt"):
        shutil.copy(frame(spoilt, "patient032", role), frame(spoilt, "patient001", role))
    assert ("patient032_frame01.nii.gz", "duplicate") in found("acdc", spoilt)
    assert "patient001" not in acdc(spoilt).train.patients
    assert "patient001 has images of patient032 and is left out of train" in capsys.readouterr().out


def test_acdc_options(hearts, tmp_path):
    for options, text in ((dict(size=0), "size=0"), (dict(foreground=4), "0 for all classes or one of 1 to 3")):
        refused("acdc", hearts, text, **options)
    with pytest.raises(TypeError, match="did you mean foreground"):
        acdc(hearts, forground=3)
    with pytest.raises(FileNotFoundError, match="ACDC.*'phantom:acdc'"):
        data.load("acdc", tmp_path)


@pytest.mark.skipif(not (data_root() / "ACDC" / TRAINING).is_dir(), reason="MEDKD_DATA holds no ACDC")
def test_one_real_patient_reads_plausibly():
    folder = data_root() / "ACDC"
    frames = find_acdc(folder)
    scan, problems = inspect_frame(folder, next(iter(frames["patient001"].values())))
    assert problems == [] and scan["image"].shape == (10, 256, 216)
    values = [np.median(scan["image"][scan["label"] == k]) for k in range(4)]
    assert values[3] > 1.5 * values[2], "blood is brighter than muscle"
    where = [np.argwhere(scan["label"] == k).mean(0) for k in range(4)]
    assert where[1][2] < where[3][2], "the right ventricle is on the left of the picture"
    assert sorted(frames) == sorted(f"patient{n:03d}" for n in range(1, 101))
    assert all(len(own) == 2 and all(set(files) == {"image", "label"} for files in own.values()) for own in frames.values())
