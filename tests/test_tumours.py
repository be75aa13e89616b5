"""KiTS19 and the tumours of LiTS: twins, slices cut once, crops, splits, bad copies, whole scans, scores
as released."""
import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import medkd.data as data
from medkd.__main__ import main
from medkd.data import cut
from medkd.data.base import collate
from medkd.data.cut import LAYOUTS, make_slices, read_cut
from medkd.data.files import checksums
from medkd.data.slices import resize_slices
from medkd.data.tumours import crop_of, cropped, listed_split, turned_crop
from medkd.files import read_json, writing
from medkd.inference import read_volume, score_volumes, store_predictions
from medkd.metrics import Confusion
from medkd.released import mean_scores, score_tumours, tumour_scores

FEW = dict(kits19=["case_00001", "case_00002", "case_00160", "case_00005", "case_00000"], lits=["2", "28", "0", "1"])
SHAPE, SIDE = (6, 64, 64), 64
SIZE = 48 # its slices have the side 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path/"cache"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("tumours")
    for name, cases in FEW.items(): data.phantom(name, root, cases, SHAPE)
    return root


@pytest.fixture
def twins(originals, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(originals, tmp_path/"twins"))


def load(name, root, **options):
    return data.load(f"phantom:{name}", root, **dict(dict(size=SIZE, task="tumour", split=True), **options))


def home(root, name="kits19"): return root/data.DATASETS[name].folder


def make(root, out, name="kits19", size=SIDE, **options):
    return make_slices(home(root, name), out, f"phantom:{name}", size=size, **options)


def found(root, name="kits19"): return [(p.file, p.kind) for p in data.verify(f"phantom:{name}", root)]


def native(root, name, case):
    layout = LAYOUTS[name]
    return layout.inspect(home(root, name), case, layout.find(home(root, name))[case])


# twins ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FEW)
def test_twin_is_in_order(name, originals):
    assert found(originals, name) == []
    splits = load(name, originals)
    assert (splits.name, splits.phantom, splits.classes) == (f"phantom-{name}", True, ("background", "tumour"))
    assert splits.unit == "mm" and splits.patch == (SIZE, SIZE) and splits.num_classes == 2
    for item in [*splits.train, *splits.val, *splits.test]:
        assert item["image"].shape == (1, SIZE, SIZE) and item["image"].dtype == torch.float32
        assert item["label"].shape == (SIZE, SIZE) and item["label"].dtype == torch.int64 and item["label"].max() <= 1
        assert -1 <= item["image"].min() and item["image"].max() <= 1
    assert all(1 < step < 20 for item in splits.test for step in item["spacing"])


def test_kidneys_have_tumours(originals):
    for case in FEW["kits19"]:
        scan, label, _ = native(originals, "kits19", case)
        assert set(np.unique(label)) == {0, 1, 2} and scan.pixels.shape == label.shape
        assert np.median(scan.pixels[label == 1]) > np.median(scan.pixels[label == 2]) + 20


def test_layout_is_the_official_one(originals, tmp_path):
    folder = home(originals)
    assert {p.name for p in folder.iterdir()} == {"PHANTOM", *FEW["kits19"]}
    image, label = (nibabel.load(folder/"case_00001"/f"{n}.nii.gz") for n in ("imaging", "segmentation"))
    assert image.shape == label.shape == SHAPE and nibabel.aff2axcodes(image.affine) == ("I", "P", "L")
    assert nibabel.load(folder/"case_00160/imaging.nii.gz").shape == (6, 64, 99)
    again = data.phantom("kits19", tmp_path, FEW["kits19"], SHAPE)
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    assert all((again/f).read_bytes() == (folder/f).read_bytes() for f in files)


def test_real_names_and_twins_do_not_mix(originals, tmp_path):
    with pytest.raises(ValueError, match="holds a phantom twin, not KiTS19"): data.load("kits19", originals)
    with pytest.raises(FileNotFoundError, match="(?s)KiTS19 is expected in .*neheller/kits19.*phantom:kits19"):
        data.load("kits19", tmp_path)
    with pytest.raises(ValueError, match="is a phantom twin of kits19, but 'kits19' was asked for"):
        make_slices(home(originals), tmp_path/"out", "kits19")


# splits --------------------------------------------------------------------------------------------

def test_listed_splits():
    kits, lits = (listed_split(LAYOUTS[name], LAYOUTS[name].cases, None) for name in ("kits19", "lits"))
    assert [len(part) for part in kits.values()] == [151, 17, 42] and [len(part) for part in lits.values()] == [55, 6, 70]
    assert lits["test"][:8] == ["1", "3", "4", "6", "7", "8", "10", "11"] and lits["test"][-3:] == ["128", "129", "130"]
    for name, parts in (("kits19", kits), ("lits", lits)):
        assert sorted(sum(parts.values(), [])) == sorted(LAYOUTS[name].cases)
        twin = data.DATASETS[name].cases
        assert all(listed_split(LAYOUTS[name], twin, twin).values()), "each part of the twin has a case"


def test_patients_never_cross(originals):
    for options in (dict(), dict(split_seed=1), dict(split_seed=2)):
        splits = load("kits19", originals, **options)
        parts = [set(part.patients) for part in (splits.train, splits.val, splits.test)]
        assert all(parts) and set.union(*parts) == set(FEW["kits19"]) and sum(map(len, parts)) == 5


def test_all_slices_are_scored_and_those_with_tumour_trained_on(originals):
    splits = load("kits19", originals)
    assert len(splits.val) == len(splits.test) == SHAPE[0]
    shown = {case: native(originals, "kits19", case)[1] for case in ("case_00001", "case_00002")}
    full = sum((label == 2).any((1, 2)).sum() for label in shown.values())
    train = splits.train
    assert full == sum(train.scans[case]["full"].sum() for case in shown)
    assert len(train) == sum(scan["full"].sum() for scan in train.scans.values()) < 3 * SHAPE[0]
    more = load("kits19", originals, empty=.5).train
    assert len(more) == min(2 * len(train), len(train) + len(more.empty) * len(train))


def test_a_copy_in_two_parts_is_left_out(twins, capsys):
    for name in ("imaging", "segmentation"):
        shutil.copy(home(twins)/f"case_00000/{name}.nii.gz", home(twins)/f"case_00002/{name}.nii.gz")
    assert "case_00002" not in load("kits19", twins).train.patients
    assert "case_00002 has images of case_00000 and is left out of train" in capsys.readouterr().out


def test_options_decide_the_fingerprint(originals):
    base = load("kits19", originals)
    assert load("kits19", originals).sha256 == base.sha256
    others = [dict(task="organ"), dict(window=(-100, 300)), dict(size=24), dict(empty=.2), dict(split_seed=3), dict(split=False)]
    assert len({base.sha256, *(load("kits19", originals, **o).sha256 for o in others)}) == 7
    assert load("lits", originals, task="liver").classes == ("background", "liver")


@pytest.mark.parametrize("options,error,says", [
    (dict(window=(300, -200)), ValueError, "low below high"), (dict(window=(0, 0)), ValueError, "low below high"),
    (dict(window=(1, 2, 3)), ValueError, "low below high"), (dict(window=400), TypeError, "expected tuple"),
    (dict(task="kidney"), ValueError, "'organ' or 'tumour'"), (dict(size=0), ValueError, "positive number"),
    (dict(empty=1.), ValueError, "empty=1.0"), (dict(crop=3), TypeError, "unknown option"),
    (dict(slices="nowhere"), FileNotFoundError, "no slices in nowhere")])
def test_options_that_cannot_be_meant(options, error, says, originals):
    with pytest.raises(error, match=says): load("kits19", originals, **options)


# what a network reads ------------------------------------------------------------------------------

def test_published_crop_and_windows():
    assert crop_of(384) == (512, 50, 60)
    rng = np.random.default_rng(0)
    image, label = rng.integers(-1000, 1000, (512, 512)).astype(np.int16), rng.integers(0, 3, (512, 512)).astype(np.uint8)
    item = cropped(image, label, 384, (-40, 160), 2)
    expected = 2 * (np.clip(image[50:434, 60:444], -40, 160) + 40.) / 200 - 1
    np.testing.assert_allclose(item["image"], expected, atol=1e-6)
    assert np.array_equal(item["label"], label[50:434, 60:444] == 2)
    assert np.array_equal(cropped(image, label, 384, (0, 1), 1)["label"], label[50:434, 60:444] > 0)


def test_image_and_label_turn_together_before_the_crop():
    image = np.arange(64 * 64, dtype=np.int16).reshape(64, 64)
    how, seen = dict(size=SIZE, window=(0, 64 * 64), least=1), set()
    turned = [np.rot90(x, k) for x in (image, image[::-1]) for k in range(4)]
    wanted = {cropped(x, (x % 7 == 0).astype(np.uint8), **how)["image"].tobytes() for x in turned}
    for seed in range(60):
        item = turned_crop(np.random.default_rng(seed), image, (image % 7 == 0).astype(np.uint8), **how)
        values = np.rint((item["image"] + 1) / 2 * 64 * 64)
        assert np.array_equal(values % 7 == 0, item["label"] > 0)
        seen.add(item["image"].tobytes())
    assert seen == wanted and len(seen) == 8


def test_samples_repeat_and_travel_to_workers(originals):
    splits = pickle.loads(pickle.dumps(load("kits19", originals, task="organ")))
    draw = lambda seed: splits.train.sample(1, np.random.default_rng(seed))["image"]
    assert torch.equal(draw(5), draw(5)) and len({draw(s).numpy().tobytes() for s in range(12)}) > 2
    batch = next(iter(DataLoader(splits.train, 4, collate_fn=collate, num_workers=2)))
    assert batch["image"].shape == (4, 1, SIZE, SIZE)
    assert splits.origin().sha256 == splits.sha256


# whole scans ---------------------------------------------------------------------------------------

def perfect(data):
    "A network that gives the truth of each slice in turn."
    labels = iter([data[i]["label"] for i in range(len(data))])
    class Net(torch.nn.Module):
        def forward(self, image):
            label = next(labels)
            return 20. * (torch.stack([1 - label, label])[None].float() - .5)
    return Net()


@pytest.mark.parametrize("case", ["case_00000", "case_00160"])
def test_a_scan_of_another_size_is_scored_on_its_own_grid(case, originals, tmp_path):
    test = load("kits19", originals, split=False, task="organ").test
    whole, (scan, label, _) = test.native(case), native(originals, "kits19", case)
    assert whole["label"].shape == scan.pixels.shape and np.array_equal(whole["label"], label > 0)
    assert whole["spacing"] == pytest.approx(scan.spacing)
    step = test[test.cases.index(whole["cases"][0])]["spacing"]
    assert step == pytest.approx([scan.spacing[1] * 64 / SIDE, scan.spacing[2] * scan.pixels.shape[2] / SIDE])
    maps = np.stack([test[test.cases.index(name)]["label"] for name in whole["cases"]]).astype(np.uint8)
    back = test.back(maps, scan.pixels.shape[1:], True)
    inside = resize_slices(test.back(np.ones_like(maps), (SIDE, SIDE), True), scan.pixels.shape[1:], True) > 0
    assert 2 * (back & (label > 0) & inside).sum() / (back.sum() + ((label > 0) & inside).sum()) > .9


def test_scores_of_whole_scans(originals, tmp_path):
    splits = load("kits19", originals, task="organ")
    folder = store_predictions(perfect(splits.test), splits.test, tmp_path/"stored", "0", splits.sha256)
    metrics = ("dice", "voe", "rvd", "hd95", "assd")
    scores = score_volumes(folder, splits.test, splits.classes, metrics)
    row, = scores.rows
    assert (row["case"], row["class"], row["unit"]) == ("case_00000", "kidney", "mm")
    pred = read_volume(folder, splits.test.native("case_00000")["cases"], SHAPE, back=splits.test.back)
    truth = splits.test.native("case_00000")["label"]
    both, either = (pred & truth).sum(), (pred | truth).sum()
    assert row["voe"] == pytest.approx(1 - both / either) and row["rvd"] == pytest.approx(abs(pred.sum() / truth.sum() - 1))
    released = score_tumours(folder, splits.test)
    assert released["case_00000"]["dice"] == pytest.approx(1) and abs(released["case_00000"]["rvd"]) < 1e-6
    assert mean_scores(released) == released["case_00000"]


def test_standard_overlap_errors():
    scores = Confusion(6, 2, 4, 100).scores()
    assert scores["voe"] == pytest.approx(.5) and scores["rvd"] == pytest.approx(.2)
    assert np.isnan(Confusion(0, 3, 0, 5).scores()["rvd"]) and np.isnan(Confusion(0, 0, 0, 5).scores()["voe"])


def test_released_scores_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    pred, label = rng.random((9, 8, 8)) < .4, rng.random((9, 8, 8)) < .3
    label[[0, 4]] = False
    p, g, i = (x[label.any((1, 2))].sum() for x in (pred, label, pred & label))
    assert tumour_scores(pred, label) == pytest.approx(
        dict(dice=(2 * i + 1) / (p + g + 1), voe=2 * (p - i) / (p + g + 1e-7), rvd=p / (g + 1e-7) - 1))
    assert tumour_scores(pred, label & False) == {}


# cutting -------------------------------------------------------------------------------------------

def command(root, out, *more, name="kits19"):
    return main(["slices", "--inpath", str(home(root, name)), "--outpath", str(out), "--dataset", f"phantom:{name}",
                 "--size", str(SIDE), *more])


@pytest.mark.parametrize("name", FEW)
def test_command_cuts_every_slice(name, originals, tmp_path, capsys):
    out = tmp_path/"out"
    assert command(originals, out, "--task", "tumour", name=name) == 0
    shown = capsys.readouterr()
    count = len(FEW[name])
    assert f"{count} cases ({count} cut now), {6 * count} slices" in shown.out and f"{count}/{count}" in shown.err
    listed = [tuple(row.split()) for row in (out/"tumour.txt").read_text().splitlines()]
    expected = [(case, str(k)) for case in LAYOUTS[name].find(home(originals, name))
                for k in range(6) if (read_slices(out, case)["label"][k] == 2).any()]
    assert listed == expected and listed
    assert command(originals, out, "--json", name=name) == 0
    assert json.loads(capsys.readouterr().out) == dict(cases=count, slices=6 * count, listed=len(listed), cut=0)
    splits = load(name, originals, slices=str(out))
    assert torch.equal(splits.test[2]["image"], load(name, originals).test[2]["image"])


def read_slices(out, case):
    from medkd.data.stored import map_arrays
    return map_arrays(out/f"{case}.slices", check=True)


def test_slices_are_what_the_scan_holds(originals, tmp_path):
    make(originals, tmp_path/"out")
    for case in ("case_00001", "case_00160"):
        scan, label, _ = native(originals, "kits19", case)
        arrays = read_slices(tmp_path/"out", case)
        assert arrays["shape"].tolist() == list(scan.pixels.shape) and arrays["spacing"] == pytest.approx(scan.spacing)
        if case == "case_00001":
            assert np.array_equal(arrays["image"], scan.pixels) and np.array_equal(arrays["label"], label)
        else:
            assert np.abs(arrays["image"] - resize_slices(scan.pixels, (SIDE, SIDE))).max() <= .5
            assert np.array_equal(arrays["label"], resize_slices(label, (SIDE, SIDE), True))


def test_cases_at_a_time_change_nothing(originals, tmp_path, capsys):
    made = [make(originals, tmp_path/f"out{workers}", workers=workers) for workers in (1, 3)]
    assert made[0] == made[1] and made[0]["cut"] == 5
    one, three = ({path.name: path.read_bytes() for path in (tmp_path/f"out{workers}").iterdir() if path.name[0] != "."} for workers in (1, 3))
    assert one.keys() == three.keys() and all(one[name] == three[name] for name in one if name != "slices.json")
    assert json.loads(one["slices.json"]) == json.loads(three["slices.json"])
    assert command(originals, tmp_path/"out3", "--workers", "2") == 0 and "0 cut now" in capsys.readouterr().out
    assert command(originals, tmp_path/"out3", "--workers", "-1") != 0 and "workers=-1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["store", "write_arrays", "file_sha256", "write_json"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_stopped_cutting_goes_on(where, error, originals, tmp_path, monkeypatch):
    out, calls = tmp_path/"out", []
    original = getattr(cut, where)

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) != 3: return original(*args, **kwargs)
        if where == "write_arrays": (out/".case_x.tmp").write_bytes(b"half")
        raise error("stopped")
    monkeypatch.setattr(cut, where, stopping)
    with pytest.raises(error): make(originals, out)
    monkeypatch.setattr(cut, where, original)
    before = sorted(read_json(out/"slices.json")["cases"])
    assert 0 < len(before) < 5 and not (out/"tumour.txt").exists()
    sums = {case: checksums(home(originals), sum(own.values(), []))
            for case, own in LAYOUTS["kits19"].find(home(originals)).items()}
    with pytest.raises(FileNotFoundError, match=f"lacks the slices of {5 - len(before)} of 5 cases"): read_cut(out, "tumour", sums)
    kept = {case: (out/f"{case}.slices").stat().st_mtime_ns for case in before}
    assert make(originals, out)["cut"] == 5 - len(before)
    assert kept == {case: (out/f"{case}.slices").stat().st_mtime_ns for case in before}
    assert not list(out.glob(".*.tmp")) and set(read_cut(out, "tumour", sums)) == set(sums)


def test_stopped_command_says_how_to_go_on(originals, tmp_path, monkeypatch, capsys):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cut, "store", stop)
    assert command(originals, tmp_path/"out") == 130 and "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", [lambda data: data[:-100], lambda data: data[:50] + b"x" + data[51:], lambda data: b""])
def test_damaged_slices_are_never_read(spoil, originals, tmp_path):
    out = tmp_path/"out"
    make(originals, out)
    path = out/"case_00002.slices"
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    with pytest.raises(FileNotFoundError, match="lacks the slices of 1 of 5 cases, first case_00002"):
        load("kits19", originals, slices=str(out))
    assert make(originals, out)["cut"] == 1 and path.read_bytes() == good
    assert len(load("kits19", originals, slices=str(out)).test) == 6


def test_slices_in_the_cache_mend_themselves(originals, tmp_path, capsys):
    first = load("kits19", originals)
    path, = (tmp_path/"cache").rglob("case_00002.slices")
    assert "cutting slices of 5 cases" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1])
    again = load("kits19", originals)
    assert all(torch.equal(again.train[i]["image"], first.train[i]["image"]) for i in range(len(first.train)))
    load("kits19", originals, task="organ")
    assert "cutting" in capsys.readouterr().out and capsys.readouterr().out == ""


def test_folders_with_something_else_are_refused(originals, twins, tmp_path, capsys):
    out = tmp_path/"out"
    make(originals, out)
    content = {p.name: p.read_bytes() for p in out.iterdir()}
    for root, options, says in ((originals, dict(size=32), "size 64, not 32"),
                                (originals, dict(name="lits"), "dataset 'phantom:kits19', not 'phantom:lits'")):
        with pytest.raises(FileExistsError, match=f"holds other slices.*{says}"): make(root, out, **options)
    other = home(twins)/"case_00005/segmentation.nii.gz"
    image = nibabel.load(other)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[:, ::-1].copy(), image.affine), other)
    with pytest.raises(FileExistsError, match="cut from another case_00005"): make(twins, out)
    assert command(twins, out) == 2 and "cut from another" in capsys.readouterr().err
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty \(notes.txt\)"): make(originals, tmp_path/"mine")
    assert content == {p.name: p.read_bytes() for p in out.iterdir()}
    assert [p.name for p in (tmp_path/"mine").iterdir() if p.name[0] != "."] == ["notes.txt"]


def test_only_one_process_cuts(originals, tmp_path, capsys):
    (tmp_path/"out").mkdir()
    with writing(tmp_path/"out"):
        assert command(originals, tmp_path/"out") == 2
    assert "another process is writing" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(originals, tmp_path, capsys):
    (tmp_path/"file").write_text("")
    assert command(originals, tmp_path/"file") == 2
    assert str(tmp_path/"file") in capsys.readouterr().err


# bad copies ----------------------------------------------------------------------------------------

SEGMENTATION, IMAGING = "case_00002/segmentation.nii.gz", "case_00002/imaging.nii.gz"


def rewrite(root, name, change):
    path = home(root)/name
    image = nibabel.load(path)
    values, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def labelled(values, affine):
    values[0, :3] = 3
    return values, affine


def emptied(values, affine): return values * 0, affine


def moved(values, affine): return values, affine + 5 * np.eye(4, k=3)


def cut_off(values, affine): return values[:-1], affine


def turned_float(values, affine):
    values = values.astype(np.float32)
    values[0, 0, 0] = np.nan
    return values, affine


@pytest.mark.parametrize("name,change,kind", [
    (SEGMENTATION, labelled, "values"), (SEGMENTATION, emptied, "values"), (SEGMENTATION, moved, "grid"),
    (SEGMENTATION, cut_off, "size"), (IMAGING, turned_float, "values")])
def test_wrong_content(name, change, kind, twins, tmp_path):
    rewrite(twins, name, change)
    assert (name, kind) in found(twins)
    with pytest.raises(ValueError, match=f"(?s)1 of 5 cases .*{name}"): make(twins, tmp_path/"out")
    assert len(read_json(tmp_path/"out/slices.json")["cases"]) == 4, "the other cases are cut"


@pytest.mark.parametrize("name", [SEGMENTATION, IMAGING])
def test_missing_and_truncated_files(name, twins, tmp_path):
    path = home(twins)/name
    path.write_bytes(path.read_bytes()[:200])
    assert found(twins) == [(name, "damaged")]
    with pytest.raises(ValueError, match=f"(?s)1 of 5 cases .*damaged .*{name}"): load("kits19", twins)
    path.unlink()
    assert found(twins) == [(name, "missing")]
    with pytest.raises(ValueError, match=f"(?s)1 of 5 cases .*missing .*{name}"): load("kits19", twins)


def test_cases_of_the_challenge_have_no_segmentation(twins, tmp_path):
    (home(twins)/"case_00250").mkdir()
    shutil.copy(home(twins)/IMAGING, home(twins)/"case_00250")
    assert found(twins) == [] and make(twins, tmp_path/"out")["cases"] == 5


def test_absent_cases(twins):
    shutil.rmtree(home(twins)/"case_00002")
    with pytest.raises(FileNotFoundError, match="patients case_00002 are missing"): load("kits19", twins)
    (home(twins)/"PHANTOM").unlink()
    with pytest.raises(FileNotFoundError, match="206 of the 210 cases are missing, first case_00002"):
        data.load("kits19", twins, size=SIZE)
    assert len(data.load("kits19", twins, size=SIZE, split_seed=1).test) == 6
    assert os.environ["MEDKD_CACHE"] != str(twins)
