"Two-dimensional slice sets: volumes scored from stored slices; ACDC, Gastric and Synapse in official layout; unlabelled cases."
import shutil
from functools import partial
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom

import medkd.data as data
from medkd.data.acdc_files import find_acdc, inspect_frame
from medkd.data.base import data_root
from medkd.data.semi import HalfLabelled, only_labelled, with_unlabelled
from medkd.inference import read_prediction, read_volume, score_volumes, store_predictions
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.metrics import dice
from medkd.papers import stored_scores
from medkd.surface import hd95
from medkd.trainers import Recipe, fit
from medkd.trainers.loader import Places, training_loader


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


# Gastric -------------------------------------------------------------------------------------------

SECTIONS = [*(f"train_{k:04d}" for k in range(6)), "test_0000", "test_0001"]


@pytest.fixture
def sections(tmp_path):
    data.phantom("gastric", tmp_path, SECTIONS, (64, 64))
    return tmp_path


def test_sections_are_in_order(sections, tmp_path):
    splits = data.load("phantom:gastric", sections, size=64, val=.2)
    assert found("gastric", sections) == []
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [5, 1, 2]
    assert (splits.unit, splits.classes, splits.patch) == ("px", ("background", "cancer"), (64, 64))
    item = splits.test[1]
    file = np.asarray(Image.open(sections / "Gastric/test/images/0001.png"))
    assert np.array_equal(item["image"][0], file.astype(np.float32) / 255) and item["label"].max() <= 1
    again = data.phantom("gastric", tmp_path / "again", SECTIONS, (64, 64))
    assert all((again / f).read_bytes() == (sections / "Gastric" / f).read_bytes()
               for f in (p.relative_to(again) for p in again.rglob("*.png")))
    assert data.load("phantom:gastric", sections, size=64, val=0.).train.cases == tuple(SECTIONS[:6])


def test_sections_are_scored_as_pictures(sections, tmp_path):
    splits = data.load("phantom:gastric", sections, size=32, val=0.)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    scores = score_volumes(folder, splits.test, splits.classes, ["dice", "accuracy", "miou", "assd"])
    assert [(row["case"], row["unit"]) for row in scores.rows] == [("test_0000", "px"), ("test_0001", "px")]
    pooled = scores.pooled()["cancer"]
    assert pooled["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in scores.rows]))
    middle = data.load("phantom:gastric", sections, size=32, val=0., crop=16)
    cropped = score_volumes(folder, middle.test, splits.classes, ["accuracy"])
    assert all(sum(row[c] for c in ("tp", "fp", "fn", "tn")) == 256 for row in cropped.rows)
    assert middle.sha256 != splits.sha256 and middle.test[0]["fov"].sum() == 64


@pytest.mark.parametrize("spoil, file, kind, text", [
    (lambda p: p.unlink(), "train/masks/0001.png", "missing", "its partner is here: train/images/0001.png"),
    (lambda p: p.unlink(), "train/images/0001.png", "missing", "its partner is here: train/masks/0001.png"),
    (lambda p: p.write_bytes(p.read_bytes()[:200]), "test/images/0001.png", "damaged", "cannot be decoded"),
    (lambda p: p.write_bytes(b""), "test/masks/0001.png", "damaged", "cannot be decoded"),
    (lambda p: Image.open(p).crop((0, 0, 64, 60)).save(p), "train/masks/0002.png", "size", "the mask is .60, 64., its slice .64, 64."),
    (lambda p: Image.fromarray(np.eye(64, dtype=np.uint8) * 7 + 1).save(p), "train/masks/0002.png", "values", "expected 0 and one other")])
def test_sections_that_cannot_be_used(spoil, file, kind, text, sections):
    spoil(sections / "Gastric" / file)
    assert found("gastric", sections) == [(Path(file).name, kind)]
    refused("gastric", sections, file, text)


def test_gastric_folders(sections, tmp_path):
    with pytest.raises(ValueError, match="val=1.0"):
        data.load("phantom:gastric", sections, val=1.)
    for path in (sections / "Gastric/test").rglob("0001.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="first test_0001"):
        data.load("phantom:gastric", sections)
    (tmp_path / "real/Gastric/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no picture for train and test .*masks/.*'phantom:gastric'"):
        data.load("gastric", tmp_path / "real")
    shutil.copytree(sections / "Gastric/train", tmp_path / "other/Gastric/train")
    shutil.copytree(sections / "Gastric/train", tmp_path / "other/Gastric/test")
    assert len(data.verify("gastric", tmp_path / "other")) == 6, "the same pictures train and test"
    assert len(data.load("gastric", tmp_path / "other", val=0.).train) == 0


# Synapse -------------------------------------------------------------------------------------------

ABDOMENS = ["case0005", "case0006", "case0007", "case0001", "case0002"]


@pytest.fixture(scope="session")
def abdomens(tmp_path_factory):
    root = tmp_path_factory.mktemp("abdomens")
    data.phantom("synapse", root, ABDOMENS, (5, 64, 64))
    return root


@pytest.fixture
def torn(abdomens, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(abdomens, tmp_path / "torn"))


def test_abdomens_are_in_order(abdomens, tmp_path, capsys):
    splits = data.load("phantom:synapse", abdomens, size=48, val=1)
    assert found("synapse", abdomens) == [] and "wrong order" not in capsys.readouterr().out
    assert [sorted(set(part.patients)) for part in (splits.train, splits.val, splits.test)] == [
        ["case0005", "case0006"], ["case0007"], ["case0001", "case0002"]]
    assert (splits.num_classes, splits.unit, len(splits.train), len(splits.test)) == (9, "px", 10, 10)
    with h5py.File(abdomens / "Synapse/test_vol_h5/case0001.npy.h5") as file:
        image, label = file["image"][2], file["label"][2]
    assert image.shape == (64, 64) and 0 <= image.min() <= image.max() <= 1
    assert np.array_equal(splits.test[2]["image"][0], zoom(image, 48 / 64, order=3))
    assert np.array_equal(splits.test[2]["label"], zoom(label, 48 / 64, order=0))
    again = data.phantom("synapse", tmp_path, ABDOMENS, (5, 64, 64))
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) == 3 * 5 + 2 + 3 + 1
    assert all((again / f).read_bytes() == (abdomens / "Synapse" / f).read_bytes() for f in files)


def test_both_orders(abdomens, capsys):
    authors, btcv = (data.load("phantom:synapse", abdomens, size=32, val=0, order=order) for order in ("authors", "btcv"))
    assert "sizes of order='authors', not of 'btcv'" in capsys.readouterr().out
    assert (authors.classes[7], btcv.classes[7]) == ("spleen", "aorta") and authors.sha256 != btcv.sha256
    with pytest.raises(KeyError, match="did you mean authors"):
        data.load("phantom:synapse", abdomens, order="author")


class Organs(torch.nn.Module):
    "Nine classes from the grey value."
    def forward(self, image):
        return torch.cat([-(image - k / 8).abs() for k in range(9)], 1) * 40


def test_abdomens_are_scored_per_case(abdomens, tmp_path):
    splits = data.load("phantom:synapse", abdomens, size=48, val=0)
    folder = store_predictions(Organs(), splits.test, tmp_path / "stored", "0", splits.sha256)
    scores = score_volumes(folder, splits.test, splits.classes, ["dice", "hd95_pooled"], nearest=True)
    assert [row["case"] for row in scores.rows] == ["case0001"] * 8 + ["case0002"] * 8
    whole = splits.test.native("case0001")
    pred = np.stack([zoom(read_prediction(folder, case).argmax(0), 64 / 48, order=0) for case in whole["cases"]])
    assert np.array_equal(read_volume(folder, whole["cases"], whole["label"].shape, nearest=True, back=splits.test.back), pred)
    assert scores.rows[4]["dice"] == pytest.approx(dice(pred[None], whole["label"][None].astype(int), 9)[0, 4].item())
    assert set(scores.published("dice")) == set(splits.classes[1:])


SLICE, VOLUME = "train_npz/case0006_slice002.npz", "test_vol_h5/case0001.npy.h5"


def save(path, **arrays):
    if path.suffix == ".npz":
        return np.savez(path, **arrays)
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            file[key] = values


blank = {SLICE: np.zeros((64, 64), np.float32), VOLUME: np.zeros((5, 64, 64), np.float32)}


@pytest.mark.parametrize("name", [SLICE, VOLUME])
@pytest.mark.parametrize("change, kind, text", [
    (lambda x: dict(image=x), "damaged", "it holds image; expected image and label"),
    (lambda x: dict(img=x, seg=x), "damaged", "it holds img, seg; expected"),
    (lambda x: dict(image=x, label=x[..., 1:]), "size", "its label is .*63., its image .*64."),
    (lambda x: dict(image=x[0], label=x[0]), "size", "axes"),
    (lambda x: dict(image=x + np.nan, label=x), "values", "are not finite"),
    (lambda x: dict(image=x - 1000, label=x), "values", "clip HU"),
    (lambda x: dict(image=x, label=x + 13), "values", "holds .13.0., expected 0 to 8"),
    (lambda x: dict(image=x, label=x + .5), "values", "holds .0.5., expected 0 to 8")])
def test_files_of_another_kind(name, change, kind, text, torn):
    save(torn / "Synapse" / name, **change(blank[name]))
    assert found("synapse", torn) == [(Path(name).name, kind)]
    refused("synapse", torn, name, text, "medkd verify phantom:synapse")


@pytest.mark.parametrize("name", [SLICE, VOLUME])
def test_truncated_and_missing_files(name, torn):
    path = torn / "Synapse" / name
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert found("synapse", torn) == [(path.name, "damaged")]
    refused("synapse", torn, name, "cannot be read")
    path.unlink()
    assert found("synapse", torn) == [(path.name, "missing")]
    refused("synapse", torn, name, "a list names it")


def test_lists(torn):
    lists = torn / "Synapse/lists/lists_Synapse"
    before = (lists / "train.txt").read_text()
    (lists / "train.txt").write_text(before + "case0040_slice000\n")
    assert found("synapse", torn) == [("case0040_slice000.npz", "missing")]
    refused("synapse", torn, "case0040_slice000.npz", "a list names it")
    (lists / "train.txt").write_text(before.replace("case0006_slice002\n", ""))
    assert found("synapse", torn) == [("case0006_slice002.npz", "unexpected")]
    for text, message in ((before + "case0001_slice000\n", "case0001 stand in train.txt and test_vol.txt"),
                          ("case0005.npz\n", "names 'case0005.npz'; expected")):
        (lists / "train.txt").write_text(text)
        assert [kind for _, kind in found("synapse", torn)] == ["damaged"]
        refused("synapse", torn, message)
    (lists / "train.txt").unlink()
    refused("synapse", torn, "train.txt is missing")


# unlabelled ----------------------------------------------------------------------------------------

def test_half_of_every_batch_is_unlabelled(abdomens, sections):
    for name, root, options, labelled in (("synapse", abdomens, dict(size=32, val=0), 1), ("gastric", sections, dict(size=32, val=0.), .4)):
        load = partial(data.load, f"phantom:{name}", root, **options)
        splits = with_unlabelled(load, labelled)
        alone = only_labelled(load, labelled)
        few = set(alone.train.patients)
        assert len(few) == (labelled if isinstance(labelled, int) else round(labelled * len(set(splits.train.patients))))
        for batch in training_loader(Places(splits.train, 4, seed=1, start=0, total=6), workers=0):
            assert batch["labelled"].tolist().count(True) == 2
            assert all((case.partition("_slice")[0] in few) == kept for case, kept in zip(batch["case"], batch["labelled"].tolist()))
            assert all(((label >= 0).all() if kept else (label == -1).all()) for label, kept in zip(batch["label"], batch["labelled"]))
        assert splits.origin().sha256 == splits.sha256 != alone.sha256
        with pytest.raises(ValueError, match="leaves none unlabelled"):
            with_unlabelled(load, 1.)


def test_unlabelled_fundi_are_drawn_without_their_labels(tmp_path):
    data.phantom("chasedb1", tmp_path, ["Image_01L", "Image_01R", "Image_02L", "Image_03L", "Image_10L", "Image_11L"], (48, 56))
    load = partial(data.load, "phantom:chasedb1", tmp_path, patch=32, patches_per_image=2)
    both, alone = with_unlabelled(load, 1), only_labelled(load, 1)
    own = set(alone.train.cases)
    assert len(set(alone.train.patients)) == 1 and len(set(both.train.patients)) == 3
    for batch in training_loader(Places(both.train, 4, seed=1, start=0, total=6), workers=0):
        assert batch["labelled"].tolist().count(True) == 2 and batch["image"].shape == (4, 1, 32, 32)
        assert [case in own for case in batch["case"]] == batch["labelled"].tolist()
        assert all((label == -1).all() != kept for label, kept in zip(batch["label"], batch["labelled"].tolist()))
    whole = load()
    for case, arrays in zip(whole.train.cases, whole.train.arrays):
        if case not in own: arrays["label"] = 1 - arrays["label"]
    other = with_unlabelled(whole, 1)
    assert all(torch.equal(both.train[i]["image"], other.train[i]["image"]) for i in range(len(other.train)))


def test_unlabelled_hearts_are_drawn_without_their_labels(hearts):
    both = with_unlabelled(acdc(hearts), 1)
    labelled, unlabelled = both.train.halves
    assert len(unlabelled) == 2 * 2 * 6 and len(labelled) < 2 * 6, "all slices lend their image, those with foreground train"
    assert not any(scan["label"].any() for scan in unlabelled.scans.values())
    assert {both.train.sample(i, np.random.default_rng(0))["label"].max().item() for i in range(both.train.longest, len(both.train))} == {-1}


def test_processes_share_both_halves():
    toy = [dict(image=torch.zeros(1, 4, 4), label=torch.zeros(4, 4).long(), case=f"{i}") for i in range(9)]
    train = HalfLabelled(toy[:2], toy[2:])
    parts = [list(Places(train, 8, 0, 0, 3, rank, 2)) for rank in range(2)]
    assert all([index < 7 for _, index in batch].count(True) == 2 for part in parts for batch in part)


def test_unlabelled_images_train_and_repeat(sections, tmp_path):
    splits = with_unlabelled(partial(data.load, "phantom:gastric", sections, size=16, val=0.), .4)
    net = partial(torch.nn.Conv2d, 1, 2, 3, padding=1)
    recipe = Recipe(data=splits, student=net, teacher=net(), terms=(Seg, KD), weights=dict(seg=1, kd=1), steps=6, batch_size=4)
    whole = fit(recipe, tmp_path / "whole")
    rows = [row["losses"] for row in whole.metrics("train")]
    assert rows and all(row["kd"] > 0 and row["seg"] > 0 for row in rows)
    assert fit(recipe, tmp_path / "again").sha256 == whole.sha256
