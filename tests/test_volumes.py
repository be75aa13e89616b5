"3-D data: twins in official layout, any MSD or nnU-Net folder, bad files, the cache, inference on the scanner's grid, real hippocampi."
import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import medkd.data as data
from medkd.data.base import collate, data_root
from medkd.data.volumes import nifti_bytes, read_label, read_volume
from medkd.inference import dice_score
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.native import published_mean, read_labels, score_labels, store_labels
from medkd.trainers import Recipe, fit

TORSO, BRAIN = (16, 24, 24), (24, 24, 16)
TWINS = dict(btcv=(["0001", "0002", "0032", "0035"], TORSO), word=(["train/word_0001", "val/word_0002", "test/word_0003"], TORSO),
             brats21=([f"BraTS2021_{i:05d}" for i in range(5)], BRAIN),
             msd=([f"hippocampus_{i:03d}" for i in range(1, 9)], (20, 24, 20)), nnunet=([f"case_{i}" for i in range(4)], BRAIN))
OPTIONS = dict(btcv=dict(spacing=(16., 16., 16.), patch=(16, 16, 16)), word=dict(spacing=(16., 16., 16.), patch=(16, 16, 16)),
               brats21=dict(patch=(16, 16, 16)), msd={}, nnunet=dict(patch=(16, 16, 16)))
CLASSES = dict(btcv=14, word=17, brats21=3, msd=3, nnunet=4)
CHANNELS = dict(btcv=1, word=1, brats21=4, msd=1, nnunet=2)
HIPPOCAMPUS = "Task04_Hippocampus"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    for name, (cases, size) in TWINS.items(): data.phantom(name, root, cases, size)
    return root


@pytest.fixture
def tumours(originals, tmp_path):
    "An nnU-Net folder that a test may spoil, no twin any more."
    folder = shutil.copytree(originals / "Dataset900_Phantom", tmp_path / "Dataset001_Tumour")
    (folder / "PHANTOM").unlink()
    return folder


def load_twin(name, root, **options):
    return data.load(f"phantom:{name}", root, **OPTIONS[name] | options)


def found(folder):
    return {(problem.file, problem.kind) for problem in data.verify(f"nnunet:{folder}")}


# twins ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TWINS)
def test_twin_is_in_order(name, originals):
    splits = load_twin(name, originals)
    assert data.verify(f"phantom:{name}", originals) == []
    assert (splits.name, splits.phantom, splits.unit, splits.num_classes) == (f"phantom-{name}", True, "mm", CLASSES[name])
    assert splits.multi_label == (name == "brats21") and splits.origin().sha256 == splits.sha256
    for part in (splits.train, splits.val, splits.test):
        item = part[0]
        size = item["image"].shape[1:]
        assert item["image"].shape[0] == CHANNELS[name] and item["image"].dtype == torch.float32 and torch.isfinite(item["image"]).all()
        assert item["label"].shape == ((3, *size) if splits.multi_label else size) and item["label"].dtype == torch.int64
        assert 0 <= item["label"].min() and item["label"].max() < splits.num_classes
    assert splits.train[0]["image"].shape[1:] == splits.patch
    assert all(0 < step < 20 for step in splits.test[0]["spacing"])
    if name in ("btcv", "word"): assert 0 <= splits.test[0]["image"].min() and splits.test[0]["image"].max() <= 1


def test_twins_are_reproducible_in_official_layout(originals, tmp_path):
    expected = dict(btcv="BTCV/RawData/Training/img/img0001.nii.gz", word="WORD-V0.1.0/labelsVal/word_0002.nii.gz",
                    brats21="RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00003/BraTS2021_00003_t1ce.nii.gz",
                    msd=f"{HIPPOCAMPUS}/imagesTr/hippocampus_005.nii.gz", nnunet="Dataset900_Phantom/imagesTr/case_1_0001.nii.gz")
    for name, (cases, size) in TWINS.items():
        data.phantom(name, tmp_path, cases[:1] if name == "brats21" else cases[:5], size)
        assert (originals / expected[name]).exists()
    for path in (path for path in tmp_path.rglob("*.nii.gz")):
        assert path.read_bytes() == (originals / path.relative_to(tmp_path)).read_bytes()
    scan = nibabel.load(originals / expected["btcv"])
    assert scan.get_data_dtype() == np.int16 and scan.get_fdata().min() < -900
    seg = np.asarray(nibabel.load(originals / expected["brats21"].replace("t1ce", "seg")).dataobj)
    assert set(np.unique(seg)) == {0, 1, 2, 4}


def test_regions_are_nested(originals):
    core, whole, enhancing = load_twin("brats21", originals).test[0]["label"]
    assert (whole >= core).all() and (core >= enhancing).all() and whole.sum() > core.sum() > enhancing.sum() > 0


def test_published_parts(originals):
    cases = lambda splits: [part.cases for part in (splits.train, splits.val, splits.test)]
    assert cases(load_twin("btcv", originals)) == [("0001", "0002"), ("0032",), ("0035",)]
    assert cases(load_twin("btcv", originals, hold_out=False)) == [("0001", "0002", "0032"), (), ("0035",)]
    assert cases(load_twin("word", originals)) == [("word_0001",), ("word_0002",), ("word_0003",)]
    assert [c[0][-1] for c in cases(load_twin("brats21", originals))] == ["0", "3", "4"]


def test_patients_never_cross(originals, tumours):
    for seed in range(5):
        splits = load_twin("msd", originals, split_seed=seed)
        people = [{(int(case[-3:]) + 1) // 2 for case in part.cases} for part in (splits.train, splits.val, splits.test)]
        assert sum(map(len, people)) == len(set.union(*people)) == 4
    for kind in ("images", "labels"):
        for path in (tumours / f"{kind}Tr").iterdir(): path.rename(path.with_name(path.name.replace("case_1", "case_0b")))
    splits = data.load("nnunet", folder=tumours, patient=r"case_\d", patch=(16, 16, 16))
    assert len({part for part in (splits.train, splits.val, splits.test) if {"case_0", "case_0b"} & set(part.cases)}) == 1
    with pytest.raises(ValueError, match="does not match the case case_0"): data.load("nnunet", folder=tumours, patient="patient")


# patches -------------------------------------------------------------------------------------------

def test_patches_repeat_and_travel(originals):
    train = load_twin("btcv", originals).train
    draw = lambda data, seed=0: data.sample(5, np.random.default_rng([seed, 5]))["image"]
    assert torch.equal(draw(train), draw(train)) and not torch.equal(draw(train), draw(train, 1))
    assert torch.equal(draw(train), draw(pickle.loads(pickle.dumps(train))))
    batches = [next(iter(DataLoader(train, 4, collate_fn=collate, num_workers=n))) for n in (0, 1)]
    assert torch.equal(batches[0]["image"], batches[1]["image"]) and batches[0]["case"] == ["0001"] * 4


def test_small_volumes_are_padded_and_that_is_said(originals, capsys):
    splits = load_twin("nnunet", originals, patch=(40, 16, 16))
    assert "2 are smaller somewhere: zeros are added on both sides" in capsys.readouterr().out
    item = splits.train[0]
    assert item["image"].shape == (2, 40, 16, 16)
    other = torch.cat([item["image"][:, :8], item["image"][:, -8:]], 1)
    assert other.abs().max() < .12 and item["label"][8:32].sum() == item["label"].sum() # but for the random shift
    for patch in ((16, 16), (0, 8, 8)):
        with pytest.raises(ValueError, match="expected 3 positive sizes"): load_twin("nnunet", originals, patch=patch)


# bad files -----------------------------------------------------------------------------------------

def image(path): return nibabel.load(path)


def rewrite(path, change=lambda x: x, affine=None):
    old = image(path)
    path.write_bytes(nifti_bytes(change(np.asarray(old.dataobj)), old.affine if affine is None else affine))


def zero_spacing(path):
    nibabel.save(image(path), path.with_name("raw.nii"))
    raw = bytearray(path.with_name("raw.nii").read_bytes())
    raw[80:84] = bytes(4)
    path.with_name("raw.nii").unlink()
    path.write_bytes(raw)


def holes(pixels):
    pixels = pixels.astype(np.float32)
    pixels[0, 0, :3] = np.nan
    return pixels


LABEL, IMAGE = "labelsTr/case_0.nii.gz", "imagesTr/case_0_0001.nii.gz"
BAD = {
    "label exceeds the classes": (LABEL, lambda p: rewrite(p, lambda x: x + 2), "values", "holds 4, 5; the classes are 0, 1, 2, 3"),
    "label is negative": (LABEL, lambda p: rewrite(p, lambda x: x.astype(np.int16) - 1), "values", "holds -1"),
    "label is no integer": (LABEL, lambda p: rewrite(p, lambda x: (x / 2).astype(np.float32)), "damaged", "numbers that are no labels"),
    "label of another shape": (LABEL, lambda p: rewrite(p, lambda x: x[:-1]), "grid", "its shape is (23, 24, 16), not (24, 24, 16)"),
    "label elsewhere": (LABEL, lambda p: rewrite(p, affine=np.diag([3., 3, 4.2, 1])), "grid", "voxels lie up to 3 mm off"),
    "4-D": (IMAGE, lambda p: rewrite(p, lambda x: np.stack([x, x], -1)), "damaged", "(24, 24, 16, 2); expected one volume"),
    "truncated": (IMAGE, lambda p: p.write_bytes(p.read_bytes()[:-50]), "damaged", "cannot be read"),
    "empty": (IMAGE, lambda p: p.write_bytes(b""), "damaged", "cannot be read"),
    "spacing of zero": (IMAGE, zero_spacing, "damaged", "its spacing is 0 x 3 x 4 mm"),
    "NaN": (IMAGE, lambda p: rewrite(p, holes), "values", "3 of 9216 voxels are NaN"),
    "no label": (LABEL, Path.unlink, "missing", "case case_0 needs it"),
    "two images": (IMAGE, lambda p: p.with_name("case_0_0002.nii.gz").write_bytes(p.read_bytes()), "size", "3 channels, expected 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_file_is_one_clear_error(what, tumours):
    file, spoil, kind, message = BAD[what]
    spoil(tumours / file)
    assert {k for _, k in found(tumours)} == {kind}
    assert any(message in problem.message for problem in data.verify(f"nnunet:{tumours}"))
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError) as error:
        data.load("nnunet", folder=tumours, patch=(16, 16, 16))
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and message in lines[1] and "python -m medkd verify nnunet:" in lines[2]


def test_all_bad_files_in_one_error(tumours):
    for case, change in (("case_0", lambda x: x + 2), ("case_2", lambda x: x[:-1])): rewrite(tumours / f"labelsTr/{case}.nii.gz", change)
    shutil.copy(tumours / "labelsTr/case_1.nii.gz", tumours / "labelsTr/case_9.nii.gz")
    for k in range(2): shutil.copy(tumours / f"imagesTr/case_1_{k:04d}.nii.gz", tumours / f"imagesTr/case_3_{k:04d}.nii.gz")
    assert found(tumours) == {("labelsTr/case_0.nii.gz", "values"), ("labelsTr/case_2.nii.gz", "grid"),
                              ("labelsTr/case_9.nii.gz", "unexpected"), ("imagesTr/case_3_0000.nii.gz", "duplicate")}
    with pytest.raises(ValueError, match=r"(?s)case_0.*case_2"): data.load("nnunet", folder=tumours, patch=(16, 16, 16))


def test_incomplete_sets(originals, tmp_path):
    twins = Path(shutil.copytree(originals, tmp_path / "twins"))
    (twins / "BTCV/RawData/Training/label/label0032.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="label0032.nii.gz: case 0032 needs it"): load_twin("btcv", twins)
    shutil.rmtree(twins / "WORD-V0.1.0/imagesTs")
    with pytest.raises(FileNotFoundError, match="incomplete: without word_0003"): load_twin("word", twins)
    (twins / "BTCV/RawData/PHANTOM").unlink()
    assert {p.kind for p in data.verify("btcv", twins)} == {"missing"} and len(data.verify("btcv", twins)) == 53
    with pytest.raises(FileNotFoundError, match="img0003.nii.gz"): data.load("btcv", twins)
    for name in TWINS:
        with pytest.raises(FileNotFoundError, match=f"phantom:{name}"): data.load(name, tmp_path / "nowhere")


def test_wrong_options(originals):
    with pytest.raises(TypeError, match="did you mean spacing"): load_twin("btcv", originals, spacings=(1, 1, 1))
    with pytest.raises(ValueError, match="spacing=.0.0"): load_twin("btcv", originals, spacing=(0, 1, 1))
    with pytest.raises(ValueError, match="grey='mri'"): load_twin("msd", originals, grey="mri")
    with pytest.raises(TypeError, match="none for a twin"): data.load("phantom:msd", originals, task="Task09_Spleen")
    with pytest.raises(FileNotFoundError, match="Task09_Spleen"): data.load("msd", originals, task="Task09_Spleen")
    with pytest.raises(KeyError, match="did you mean brats21"): data.load("brats22")


# any folder ----------------------------------------------------------------------------------------

def put(path, pixels, affine=np.eye(4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png": Image.fromarray(pixels).save(path)
    else: path.write_bytes(nifti_bytes(pixels, affine))


def blob(shape, seed):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    centre = np.array(shape)[(slice(None), *[None] * len(shape))] * rng.uniform(.4, .6)
    label = (((grid - centre) ** 2).sum(0) < (min(shape) / 3) ** 2).astype(np.uint8)
    return (100 * label + rng.normal(50, 9, shape)).clip(0, 255).astype(np.uint8), label


def test_msd_with_two_modalities(tmp_path):
    folder = tmp_path / "Task05_Prostate"
    for i in range(4):
        pixels, label = blob((20, 18, 8), i)
        put(folder / f"imagesTr/prostate_{i:02d}.nii.gz", np.stack([pixels, 255 - pixels], -1))
        put(folder / f"labelsTr/prostate_{i:02d}.nii.gz", label)
        put(folder / f"imagesTr/._prostate_{i:02d}.nii.gz", pixels)
    scanned = data.load("msd", tmp_path, task="Task05_Prostate")
    assert scanned.train[0]["image"].shape[0] == 2 and scanned.classes == ("background", "label 1")
    about = dict(modality={"0": "T2", "1": "ADC"}, labels={"0": "background", "1": "prostate"},
                 training=[dict(image=f"./imagesTr/prostate_{i:02d}.nii.gz", label=f"./labelsTr/prostate_{i:02d}.nii.gz")
                           for i in range(4)])
    (folder / "dataset.json").write_text(json.dumps(about))
    named = data.load("msd:Task05_Prostate", tmp_path)
    assert named.name == "msd-Task05_Prostate" and named.classes == ("background", "prostate") and named.origin().sha256 == named.sha256
    assert data.verify("msd:Task05_Prostate", tmp_path) == []
    (folder / "dataset.json").write_text(json.dumps(about | dict(modality={"0": "T2"})))
    with pytest.raises(ValueError, match=r"\(20, 18, 8, 2\); expected one volume"): data.load("msd", tmp_path, task="Task05_Prostate")


def test_flat_images(tmp_path):
    for ending, unit in ((".png", "px"), (".nii.gz", "mm")):
        folder = tmp_path / f"Dataset001{ending[1:4]}"
        for i in range(4):
            pixels, label = blob((40, 36), i)
            colours = np.stack([pixels] * 3, -1) if ending == ".png" else pixels[:, :, None]
            put(folder / f"imagesTr/c{i}_0000{ending}", colours, np.diag([.5, .5, 1, 1]))
            put(folder / f"labelsTr/c{i}{ending}", label if ending == ".png" else label[:, :, None], np.diag([.5, .5, 1, 1]))
        splits = data.load("nnunet", folder=folder)
        item = splits.test[0]
        assert (splits.unit, splits.patch, len(item["image"])) == (unit, (32, 32), 3 if ending == ".png" else 1)
        assert item["label"].shape == (40, 36) and item.get("spacing") == (None if unit == "px" else (.5, .5))
        net = Bright(splits.train.stored[0].arrays()["image"])
        scores = score_labels(store_labels(net, splits.test, tmp_path / ending, "w", "d", splits.patch), splits.test, splits.classes)
        assert scores.mean()["dice"] > .95 and scores.rows[0]["unit"] == unit


def test_masks_of_0_and_255_need_a_description(tmp_path):
    for i in range(4):
        pixels, label = blob((40, 36), i)
        put(tmp_path / f"raw/imagesTr/c{i}_0000.png", pixels)
        put(tmp_path / f"raw/labelsTr/c{i}.png", 255 * label)
    with pytest.raises(ValueError, match="no dataset.json, and its label maps hold 0, 255; expected classes 0, 1"):
        data.load("nnunet", folder=tmp_path / "raw")


class Bright(nn.Module):
    "Foreground is what is brighter than the middle of some images."
    def __init__(self, image):
        super().__init__()
        self.limit = float((image[0].max() + image[0].min()) / 2)

    def forward(self, x): return torch.cat([self.limit - x[:, :1], x[:, :1] - self.limit], 1)


# the cache -----------------------------------------------------------------------------------------

def test_prepared_once_and_again_when_damaged(originals, tmp_path, monkeypatch, capsys):
    before = load_twin("msd", originals)
    entries = sorted((tmp_path / "cache/volumes").iterdir())
    assert len(entries) == 8
    monkeypatch.setattr("medkd.data.task_files.read_case", None)
    assert torch.equal(load_twin("msd", originals).test[0]["image"], before.test[0]["image"])
    monkeypatch.undo()
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))
    for entry in entries:
        content = bytearray(entry.read_bytes())
        content[-7] ^= 4
        entry.write_bytes(content)
    after = load_twin("msd", originals)
    for i in range(len(after.test)): assert torch.equal(after.test[i]["image"], before.test[i]["image"])
    assert capsys.readouterr().out.count("damaged cache entry") == len(after.test)


def test_options_and_files_decide_the_checksum(originals, tumours):
    others = {}, dict(patch=(8, 8, 8)), dict(grey="ct"), dict(spacing=(4., 4., 4.)), dict(split_seed=1)
    shas = [load_twin("nnunet", originals, **options).sha256 for options in others]
    assert len(set(shas)) == 5
    options = dict(folder=tumours, patch=(16, 16, 16))
    first = data.load("nnunet", **options)
    assert first.sha256 == shas[0]
    rewrite(tumours / LABEL, lambda x: np.minimum(x, 2))
    assert data.load("nnunet", **options).sha256 != first.sha256


# training and inference ----------------------------------------------------------------------------

def tiny(channels, classes): return nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, classes, 3, padding=1))


@pytest.mark.parametrize("name", ["msd", "brats21"])
def test_train_validate_store_score(name, originals, tmp_path):
    splits = load_twin(name, originals, patch=(16, 16, 16), patches_per_volume=1)
    recipe = Recipe(data=splits, student=partial(tiny, CHANNELS[name], CLASSES[name]), terms=(Seg,), weights=dict(seg=1), steps=2,
                    batch_size=2, validate=partial(dice_score, overlap=.5, blend="constant"), precision="fp32")
    run = fit(recipe, tmp_path / "run")
    assert 0 <= run.metrics("val")[-1]["scores"]["dice"] <= 1
    net, case = run.network().eval(), splits.test.cases[0]
    folder = store_labels(net, splits.test, tmp_path / "native", run.sha256, splits.sha256, splits.patch)
    scores = score_labels(folder, splits.test, splits.classes)
    again = score_labels(folder, splits.test, splits.classes)
    assert str(scores.rows) == str(again.rows) and {row["unit"] for row in scores.rows} == {"mm"}
    assert len(scores.rows) == len(splits.test) * (3 if splits.multi_label else 2)
    native = splits.test.native(case)
    assert read_labels(folder, case).shape == native["label"].shape
    assert np.allclose(read_label(folder / f"{case}.nii.gz").affine, native["affine"], atol=1e-4)
    kept = replace(splits, sha256="another")
    assert store_labels(net, kept.test, folder, run.sha256, kept.sha256, splits.patch) == folder
    assert json.loads((folder / "predictions.json").read_text())["data_sha256"] == "another"


class Oracle(nn.Module):
    "Gives back the label, which a test shows it as the image."
    def __init__(self, classes, missed=(), value=-99.):
        super().__init__()
        self.classes, self.missed, self.value = classes, missed, value

    def forward(self, x):
        logits = torch.cat([-(x - k).abs() for k in range(self.classes)], 1)
        for k in self.missed: logits[:, k] = self.value
        return logits


class Shown:
    "Volumes whose image is their label."
    def __init__(self, volumes): self.volumes = volumes
    def __getattr__(self, name): return getattr(self.volumes, name)
    def __len__(self): return len(self.volumes)
    def __getitem__(self, i): return self.volumes[i] | dict(image=self.volumes[i]["label"][None].float())


def test_both_evaluations(originals, tmp_path):
    splits = load_twin("btcv", originals, spacing=(9., 9., 9.))
    shown = Shown(splits.test)
    stored = partial(store_labels, data=shown, weights_sha256="w", data_sha256="d", tile=splits.patch)
    native = score_labels(stored(Oracle(14), folder=tmp_path / "a"), shown, splits.classes)
    published = score_labels(stored(Oracle(14), folder=tmp_path / "b", evaluation="published"), shown, splits.classes, ("dice", "hd95"))
    assert published_mean(published) == dict(dice=100., hd95=0.)
    assert native.per_class("dice")["liver"] > .8 and {row["unit"] for row in published.rows} == {"px"}
    missing = Oracle(14, missed=(6,))
    native = score_labels(stored(missing, folder=tmp_path / "c"), shown, splits.classes)
    published = score_labels(stored(missing, folder=tmp_path / "d", evaluation="published"), shown, splits.classes, ("dice", "hd95"))
    assert native.per_class("hd95")["liver"] > 200 and np.isnan(published.per_class("hd95")["liver"])
    assert native.per_class("dice")["liver"] == published.per_class("dice")["liver"] == 0


TURNS = {"flipped": np.diag([-1., 1, -1]), "permuted": np.eye(3)[[2, 0, 1]], "both": -np.eye(3)[[1, 2, 0]],
         "oblique": np.linalg.qr(np.eye(3)[[1, 0, 2]] * (1, -1, 1) + .2)[0]}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("grey", ["zscore", "ct"])
def test_labels_come_back_to_the_grid_of_the_file(turn, grey, tmp_path):
    affine = np.eye(4)
    affine[:3] = np.c_[TURNS[turn] * (.7, 1.2, 3.), (-40, 12, 7)]
    rng, folder = np.random.default_rng(0), tmp_path / "Dataset002_Turned"
    for i in range(4):
        pixels, label = blob((14, 18, 9), i)
        put(folder / f"imagesTr/c{i}_0000.nii.gz", pixels, affine)
        put(folder / f"labelsTr/c{i}.nii.gz", label + rng.integers(0, 2, label.shape).astype(np.uint8), affine)
    splits = data.load("nnunet", folder=folder, grey=grey, patch=(8, 8, 8))
    case = splits.test.cases[0]
    stored = store_labels(Oracle(3), Shown(splits.test), tmp_path / "out", "w", "d", splits.patch)
    ours, theirs = (nibabel.load(path) for path in (stored / f"{case}.nii.gz", folder / f"labelsTr/{case}.nii.gz"))
    assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj)) and np.allclose(ours.affine, theirs.affine, atol=1e-5)
    assert np.allclose(splits.test.native(case)["spacing"], (.7, 1.2, 3.)) and score_labels(stored, splits.test, splits.classes).mean()["hd95"] == 0


@pytest.mark.parametrize("net,rule", [("unet3d_tiny", "multiples of 8"), ("lcovnet", "multiples of 16 and of at least 32")])
def test_a_patch_that_the_network_cannot_take(net, rule, originals, tmp_path):
    splits = load_twin("msd", originals, patch=(16, 20, 16))
    recipe = Recipe(data=splits, student=partial(build, net, 1, 3, .125), terms=(Seg,), weights=dict(seg=1), steps=1, batch_size=1, precision="fp32")
    with pytest.raises(ValueError, match=rf"{rule}, but was given \(16, 20, 16\): pad, crop or resize"): fit(recipe, tmp_path / "run")
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_not_finite_and_unknown_blend(originals, tmp_path):
    splits = load_twin("msd", originals)
    with pytest.raises(ValueError, match="case hippocampus_00.: the prediction is not finite"):
        store_labels(Oracle(3, missed=(0, 1, 2), value=np.nan), splits.test, tmp_path / "x", "w", "d", splits.patch)
    with pytest.raises(ValueError, match="blend='linear'"):
        store_labels(Oracle(3), splits.test, tmp_path / "y", "w", "d", splits.patch, blend="linear")


# real hippocampi -----------------------------------------------------------------------------------

real = pytest.mark.skipif(not (data_root() / HIPPOCAMPUS / "imagesTr").is_dir(), reason=f"MEDKD_DATA holds no {HIPPOCAMPUS}")


@real
def test_real_hippocampi(tmp_path, capsys):
    splits = data.load("msd", task=HIPPOCAMPUS)
    said = capsys.readouterr().out
    if not (data_root() / HIPPOCAMPUS / "dataset.json").exists():
        assert "no dataset.json here; 260 labelled cases" in said and splits.classes == ("background", "anterior", "posterior")
        assert [len(part.cases) for part in (splits.train, splits.val, splits.test)] == [166, 40, 54]
    people = [set(part.patients) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, people)) == len(set.union(*people)) and splits.patch == (32, 48, 32)
    shown, few = Shown(splits.test), 3
    for name in ("cases", "stored", "patients"): setattr(splits.test, name, getattr(splits.test, name)[:few])
    scores = score_labels(store_labels(Oracle(3), shown, tmp_path / "p", "w", "d", splits.patch), shown, splits.classes)
    assert scores.mean()["dice"] == 1 and scores.mean()["hd95"] == 0 and scores.rows[0]["unit"] == "mm"
    assert read_volume(tmp_path / f"p/{splits.test.cases[0]}.nii.gz").spacing == (1, 1, 1)
