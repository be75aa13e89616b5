"CHAOS and LiTS: twins in official layout, patients that never cross, every kind of bad copy, one real CHAOS case."
import pickle
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import medkd.data as data
from medkd.data.base import collate, data_root
from medkd.data.files import read_marker
from medkd.data.liver_files import CHAOS, LITS
from medkd.data.slices import resize_slices
from medkd.inference import score_predictions, store_predictions

LAYOUTS = dict(chaos=CHAOS, lits=LITS)
FEW = dict(chaos=["1", "2", "5", "6"], lits=["0", "1", "28"])
SHAPE = (8, 64, 72)
SERIES, GROUND = "Train_Sets/CT/2/DICOM_anon", "Train_Sets/CT/2/Ground"
VOLUME, SEGMENTATION = "Training Batch 1/volume-1.nii", "Training Batch 1/segmentation-1.nii"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("livers")
    for name, cases in FEW.items():
        data.phantom(name, root, cases, SHAPE)
    return root


@pytest.fixture
def twins(originals, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(originals, tmp_path / "twins"))


def load_twin(name, root, **options):
    return data.load(f"phantom:{name}", root, **dict(dict(size=48), **options))


def found(name, root):
    return [(problem.file, problem.kind) for problem in data.verify(f"phantom:{name}", root)]


def slices(root):
    return sorted((root / "CHAOS" / SERIES).iterdir())


# twins ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LAYOUTS)
def test_twin_is_in_order(name, originals):
    splits = load_twin(name, originals)
    assert found(name, originals) == []
    assert (splits.name, splits.phantom, splits.classes) == (f"phantom-{name}", True, ("background", "liver"))
    assert splits.unit == "mm" and splits.patch == (48, 48)
    for item in [*splits.val, *splits.test]:
        assert item["image"].shape == (1, 48, 48) and item["image"].dtype == torch.float32
        assert item["label"].shape == (48, 48) and item["label"].dtype == torch.int64
        assert 0 <= item["image"].min() and item["image"].max() <= 1 and item["label"].max() <= 1
        assert all(1 < step < 20 for step in item["spacing"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_twin_is_reproducible(name, originals, tmp_path):
    again = data.phantom(name, tmp_path, FEW[name], SHAPE)
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert all((again / f).read_bytes() == (originals / again.name / f).read_bytes() for f in files)
    assert load_twin(name, tmp_path).sha256 == load_twin(name, originals).sha256
    other = data.phantom(name, tmp_path / "other", FEW[name], SHAPE, seed=1)
    for case, files in LAYOUTS[name].find(again).items():
        pairs = zip(files["image"], LAYOUTS[name].find(other)[case]["image"])
        assert all((again / a).read_bytes() != (other / b).read_bytes() for a, b in pairs)


def test_official_layout(originals):
    for name, folder in (("chaos", "CHAOS"), ("lits", "LiTS")):
        assert read_marker(originals / folder)["cases"] == FEW[name]
    assert {p.name for p in (originals / "CHAOS/Train_Sets/CT").iterdir()} == set(FEW["chaos"])
    assert len(list((originals / "CHAOS" / SERIES).glob("*.dcm"))) == SHAPE[0]
    assert sorted(p.name for p in (originals / "CHAOS" / GROUND).iterdir())[0] == "liver_GT_000.png"
    assert {p.name for p in (originals / "LiTS").iterdir()} == {"PHANTOM", "Training Batch 1", "Training Batch 2"}
    assert (originals / "LiTS/Training Batch 2/segmentation-28.nii").exists()


def test_headers_of_the_twins_differ(tmp_path):
    chaos = data.phantom("chaos", tmp_path, CHAOS.cases[:8], (4, 32, 32))
    heads = [pydicom.dcmread(next(p.glob("DICOM_anon/*"))) for p in (chaos / "Train_Sets/CT").iterdir()]
    assert len({(float(h.RescaleSlope), float(h.RescaleIntercept)) for h in heads}) > 1
    assert len({tuple(h.PixelSpacing) for h in heads}) == 8
    lits = data.phantom("lits", tmp_path, LITS.cases[:8], (4, 32, 32))
    images = [nibabel.load(path) for path in lits.glob("*/volume-*.nii")]
    assert len({nibabel.aff2axcodes(image.affine) for image in images}) > 1
    assert all(image.get_data_dtype() == np.int16 for image in images)


def test_tissues_have_their_hounsfield_units(originals):
    for name, layout in LAYOUTS.items():
        folder = originals / data.DATASETS[name].folder
        for patient, files in layout.find(folder).items():
            scan, label, _ = layout.inspect(folder, patient, files)
            assert 20 < np.median(scan.pixels[label]) < 180
            assert np.median(scan.pixels[:, :3]) < -900 and scan.pixels.max() > 250
            right, left = label[..., :36].sum(), label[..., 36:].sum()
            assert right > 2 * left, "the liver is on the left of the picture"


# splits and items ----------------------------------------------------------------------------------

def test_patients_never_cross(originals):
    splits = load_twin("chaos", originals)
    parts = [set(part.patients) for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in parts] == [2, 1, 1] and set.union(*parts) == set(FEW["chaos"])
    for part in (splits.train, splits.val, splits.test):
        assert all(case.startswith(f"{patient}_") for case, patient in zip(part.cases, part.patients))
    others = [load_twin("chaos", originals, split_seed=seed) for seed in range(4)]
    assert len({tuple(sorted(set(other.test.patients))) for other in others}) > 1
    assert len({other.sha256 for other in others}) > 1


def test_lits_is_a_target(originals):
    splits = load_twin("lits", originals)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (0, 0, 3 * SHAPE[0])
    assert [len(set(part.patients)) for part in (lambda s: (s.train, s.val, s.test))(
        load_twin("lits", originals, split=True))] == [1, 1, 1]


def test_training_slices(originals):
    train = load_twin("chaos", originals, empty=.5).train
    assert len(train.full) > 4 and len(train) == 2 * len(train.full)
    for index in range(len(train)):
        item = train.sample(index, np.random.default_rng(index))
        again = train.sample(index, np.random.default_rng(index))
        assert all(torch.equal(item[key], again[key]) for key in ("image", "label"))
        assert item["image"].shape == (1, 48, 48) and "spacing" not in item
        assert index < len(train.full) or not item["label"].any()
    assert all(train.sample(i, np.random.default_rng(0))["label"].any() for i in range(0, len(train.full), 3))
    whole = load_twin("chaos", originals, empty=0.).train
    assert len(whole) == len(train.full)


def test_batches_through_workers(originals):
    splits = pickle.loads(pickle.dumps(load_twin("chaos", originals)))
    batch = next(iter(DataLoader(splits.train, 4, collate_fn=collate, num_workers=2)))
    assert batch["image"].shape == (4, 1, 48, 48) and batch["label"].dtype == torch.int64
    batch = next(iter(DataLoader(splits.test, 4, collate_fn=collate)))
    assert len(batch["spacing"]) == 4 and len(batch["spacing"][0]) == 2
    assert splits.origin().sha256 == splits.sha256


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_patients_on_the_scanners_grid(name, originals):
    test = load_twin(name, originals, size=64).test
    patient = test.patients[0]
    whole = test.native(patient)
    assert whole["label"].shape == SHAPE and len(whole["cases"]) == SHAPE[0] and len(whole["spacing"]) == 3
    items = [test[test.cases.index(case)] for case in whole["cases"]]
    maps = np.stack([item["label"] for item in items]).astype(np.float32)
    back = resize_slices(maps, whole["label"].shape[1:]) >= .5
    assert 2 * (back & (whole["label"] > 0)).sum() / (back.sum() + whole["label"].sum()) > .96
    step = np.multiply(items[0]["spacing"], 64) / np.multiply(whole["spacing"][1:], SHAPE[1:])
    assert np.allclose(step, 1)
    with pytest.raises(KeyError, match="unknown patient"):
        test.native("77")


class Bright(torch.nn.Module):
    "Calls liver what is bright."
    def forward(self, image):
        return torch.cat([.5 - image, image - .5], 1) * 20


def test_predictions_are_stored_and_scored(originals, tmp_path):
    splits = load_twin("chaos", originals)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    scores = score_predictions(folder, splits.test, splits.classes, ("dice", "hd95"))
    assert [row["case"] for row in scores.rows] == list(splits.test.cases)
    assert {row["unit"] for row in scores.rows} == {"mm"}
    assert 0 < np.nanmean([row["dice"] for row in scores.rows]) < 1


# bad copies ----------------------------------------------------------------------------------------

def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def refused(name, root, *parts):
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(str, parts))):
        load_twin(name, root)


def test_missing_slice(twins):
    gone = slices(twins)[3]
    gone.unlink()
    assert found("chaos", twins) == [(SERIES, "missing")]
    refused("chaos", twins, SERIES, "slices missing between", slices(twins)[2].name, "medkd verify phantom:chaos")


def test_missing_slice_and_its_mask(twins):
    slices(twins)[3].unlink()
    (twins / "CHAOS" / GROUND / "liver_GT_003.png").unlink()
    assert found("chaos", twins) == [(SERIES, "missing")]


@pytest.mark.parametrize("end", [0, -1])
def test_missing_end_of_a_series(end, twins):
    slices(twins)[end].unlink()
    assert found("chaos", twins) == [(SERIES, "missing")]
    refused("chaos", twins, SERIES, "7 slices for 8 masks")


@pytest.mark.parametrize("new", ["i0003,0000c.dcm", "IMG-9999-00001.dcm", "a.dcm"])
def test_doubled_slice(new, twins):
    shutil.copy(slices(twins)[3], twins / "CHAOS" / SERIES / new)
    (file, kind), = found("chaos", twins)
    assert kind == "duplicate" and Path(file).parent == Path(SERIES)
    refused("chaos", twins, SERIES, "lies 0.00 mm from")


def test_missing_mask(twins):
    (twins / "CHAOS" / GROUND / "liver_GT_003.png").unlink()
    assert found("chaos", twins) == [(GROUND, "missing")]
    refused("chaos", twins, GROUND, "8 slices for 7 masks; no mask has the number 3")


def test_missing_folders(twins):
    shutil.rmtree(twins / "CHAOS" / GROUND)
    assert found("chaos", twins) == [(GROUND, "missing")]
    refused("chaos", twins, GROUND, "8 slices for 0 masks")
    shutil.rmtree(twins / "CHAOS/Train_Sets/CT/5/DICOM_anon")
    assert ("Train_Sets/CT/5/DICOM_anon", "missing") in found("chaos", twins)


@pytest.mark.parametrize("length", [0, 100, 400, .5])
def test_truncated_slice(length, twins):
    path = slices(twins)[3]
    path.write_bytes(path.read_bytes()[:length if length != .5 else path.stat().st_size // 2])
    assert found("chaos", twins) == [(f"{SERIES}/{path.name}", "damaged")]
    refused("chaos", twins, path.name, "cannot be read")


def test_truncated_mask(twins):
    path = twins / "CHAOS" / GROUND / "liver_GT_003.png"
    truncate(path)
    assert found("chaos", twins) == [(f"{GROUND}/{path.name}", "damaged")]
    refused("chaos", twins, path.name)


def change(path, **values):
    file = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(file, name, value)
    file.save_as(path)


def test_odd_headers(twins):
    path = slices(twins)[3]
    name = f"{SERIES}/{path.name}"
    change(path, PixelSpacing=[1, 1])
    assert found("chaos", twins) == [(name, "grid")]
    file = pydicom.dcmread(path)
    del file.RescaleIntercept
    file.save_as(path)
    assert found("chaos", twins) == [(name, "damaged")]
    refused("chaos", twins, path.name, "RescaleIntercept")


def test_slices_in_another_order(twins):
    first, second = slices(twins)[2:4]
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    assert found("chaos", twins) == [(SERIES, "grid")]


def save_mask(path, pixels):
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_masks_of_another_size_or_with_other_values(twins):
    path = twins / "CHAOS" / GROUND / "liver_GT_003.png"
    mask = np.asarray(Image.open(path)).astype(np.uint8)
    save_mask(path, mask[:-1])
    assert found("chaos", twins) == [(f"{GROUND}/{path.name}", "size")]
    refused("chaos", twins, path.name, r"the mask is \(63, 72\), its slice \(64, 72\)")
    save_mask(path, mask * 63 + np.eye(64, 72) * 100)
    assert found("chaos", twins) == [(f"{GROUND}/{path.name}", "values")]
    save_mask(path, mask * 63)
    assert found("chaos", twins) == []


def test_no_liver(twins):
    for path in (twins / "CHAOS" / GROUND).iterdir():
        save_mask(path, np.zeros((64, 72)))
    assert found("chaos", twins) == [(GROUND, "values")]
    refused("chaos", twins, "no liver")


@pytest.mark.parametrize("name", [VOLUME, SEGMENTATION])
@pytest.mark.parametrize("length", [0, 200, .5])
def test_truncated_volume(name, length, twins):
    path = twins / "LiTS" / name
    path.write_bytes(path.read_bytes()[:length if length != .5 else path.stat().st_size // 2])
    assert found("lits", twins) == [(name, "damaged")]
    refused("lits", twins, name, "cannot be read")


def resave(path, turn=lambda x: x, affine=lambda x: x):
    image = nibabel.load(path, mmap=False)
    nibabel.save(nibabel.Nifti1Image(turn(np.asarray(image.dataobj)), affine(image.affine)), path)


@pytest.mark.parametrize("kind,turn,affine", [
    ("size", lambda x: x[:-1], lambda a: a), ("values", lambda x: x * 3, lambda a: a),
    ("values", lambda x: x * 0, lambda a: a), ("grid", lambda x: x, lambda a: a * [[1, 1, 1, 1.2]]),
    ("grid", lambda x: x, lambda a: a @ np.diag([1, 1, 1.1, 1])),
    ("damaged", lambda x: np.stack([x, x], -1), lambda a: a)])
def test_segmentations_that_do_not_fit(kind, turn, affine, twins):
    resave(twins / "LiTS" / SEGMENTATION, turn, affine)
    assert found("lits", twins) == [(SEGMENTATION, kind)]
    refused("lits", twins, SEGMENTATION)


@pytest.mark.parametrize("name,other", [(VOLUME, SEGMENTATION), (SEGMENTATION, VOLUME)])
def test_missing_partner(name, other, twins):
    (twins / "LiTS" / name).unlink()
    assert found("lits", twins) == [(name, "missing")]
    refused("lits", twins, name, f"its partner is here: {other}")


def test_a_volume_in_both_batches(twins):
    shutil.copy(twins / "LiTS" / VOLUME, twins / "LiTS/Training Batch 2")
    assert found("lits", twins) == [("Training Batch 2/volume-1.nii", "duplicate")]


def test_a_patient_twice(twins):
    folder = twins / "CHAOS/Train_Sets/CT"
    shutil.copytree(folder / "2", folder / "30")
    (file, kind), = found("chaos", twins)
    assert kind == "duplicate" and file.startswith("Train_Sets/CT/30/")
    shutil.copy(twins / "LiTS" / VOLUME, twins / "LiTS/Training Batch 1/volume-7.nii")
    shutil.copy(twins / "LiTS" / SEGMENTATION, twins / "LiTS/Training Batch 1/segmentation-7.nii")
    assert found("lits", twins) == [("Training Batch 1/volume-7.nii", "duplicate")]


def test_half_copied_twin(twins):
    shutil.rmtree(twins / "CHAOS/Train_Sets/CT/6")
    assert [kind for _, kind in found("chaos", twins)] == ["missing"]
    with pytest.raises(FileNotFoundError, match="patients 6 are missing"):
        load_twin("chaos", twins)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_patients(count, originals, tmp_path):
    (tmp_path / "CHAOS/Train_Sets/MR").mkdir(parents=True)
    for patient in FEW["chaos"][:count]:
        shutil.copytree(originals / "CHAOS/Train_Sets/CT" / patient, tmp_path / "CHAOS/Train_Sets/CT" / patient)
    if count == 3:
        assert len(set(data.load("chaos", tmp_path, size=48).train.patients)) == 1
        return
    with pytest.raises(ValueError) as error:
        data.load("chaos", tmp_path)
    for part in (f"labelled patients found: {count}", tmp_path / "CHAOS", "at least 3", "'phantom:chaos'"):
        assert str(part) in str(error.value)
    assert [p.kind for p in data.verify("chaos", tmp_path)] == ["missing"] * (count == 0)


def test_a_changed_slice_is_read_again(twins):
    before = load_twin("chaos", twins, split_seed=1)
    for path in (twins / "CHAOS/Train_Sets/CT").glob("*/DICOM_anon/*"):
        change(path, RescaleIntercept=-900)
    after = load_twin("chaos", twins, split_seed=1)
    assert before.sha256 != after.sha256
    assert not torch.equal(before.test[4]["image"], after.test[4]["image"])


def test_names_and_options(originals, tmp_path):
    with pytest.raises(KeyError, match="did you mean chaos"):
        data.load("choas")
    with pytest.raises(TypeError, match="did you mean size"):
        data.load("phantom:chaos", originals, sice=64)
    with pytest.raises(TypeError, match="expected bool"):
        data.load("phantom:lits", originals, split="yes")
    with pytest.raises(ValueError, match="size=0"):
        load_twin("chaos", originals, size=0)
    with pytest.raises(ValueError, match="empty=1.5"):
        load_twin("chaos", originals, empty=1.5)
    for name in LAYOUTS:
        with pytest.raises(ValueError, match="holds a phantom twin"):
            data.load(name, originals)
        with pytest.raises(FileNotFoundError) as error:
            data.load(name, tmp_path)
        for part in (data.DATASETS[name].folder, data.DATASETS[name].page, "CC BY-NC-SA 4.0", f"'phantom:{name}'"):
            assert part in str(error.value)


# the real case -------------------------------------------------------------------------------------

real = pytest.mark.skipif(not (data_root() / "CHAOS/Train_Sets/CT/3").is_dir(), reason="MEDKD_DATA holds no CHAOS case 3")


@real
def test_real_case_is_in_order():
    problems = data.verify("chaos")
    assert problems == [] and problems.files >= 156


@real
def test_real_case_reads_plausibly():
    folder = data_root() / "CHAOS"
    scan, label, _ = CHAOS.inspect(folder, "3", CHAOS.find(folder)["3"])
    assert scan.pixels.shape == label.shape == (78, 512, 512)
    assert np.allclose(scan.spacing, (2, .7265625, .7265625))
    assert 40 < np.median(scan.pixels[label]) < 200
    fat, = np.diff(np.searchsorted(np.sort(scan.pixels[40].ravel()), (-130, -70)))
    other, = np.diff(np.searchsorted(np.sort(scan.pixels[40].ravel()), (-300, -240)))
    assert fat > 5 * other, "fat, about -100 HU, is a peak of the histogram"
    assert scan.pixels.min() == -1000 and label[..., :256].sum() > 5 * label[..., 256:].sum()


@real
def test_real_case_is_too_few(monkeypatch):
    if len(CHAOS.find(data_root() / "CHAOS")) >= 3:
        pytest.skip("there are enough patients here")
    with pytest.raises(ValueError, match="labelled patients found: 1 .3. in .*at least 3 .*'phantom:chaos'"):
        data.load("chaos")
    test = data.load("chaos", split=False).test
    assert len(test) == 78 and test[40]["spacing"] == (2.90625, 2.90625)
    assert .05 < test[40]["label"].float().mean() < .3
    assert 68 <= sum(bool(item["label"].any()) for item in test) <= 71
