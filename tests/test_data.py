"Data sets by name: real ones where MEDKD_DATA has them, their phantom twins, and every kind of bad copy."
import functools
import gzip
import hashlib
import io
import multiprocessing
import pickle
import shutil
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import medkd.data as data
from medkd.data.base import Archive, collate, data_root
from medkd.data.files import content_sha256, read_marker, safe_extract
from medkd.data.vessel_files import CHASEDB1, DRIVE, STARE, decode, inspect
from medkd.data.vessels import field_of_view

LAYOUTS = dict(chasedb1=CHASEDB1, stare=STARE, drive=DRIVE)
FEW = dict(chasedb1=["Image_01L", "Image_01R", "Image_10L", "Image_11L"], stare=["im0001", "im0002"],
           drive=["21_training", "39_training", "01_test", "02_test"])
SIZE = (90, 96)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    for name, cases in FEW.items():
        data.phantom(name, root, cases, SIZE)
    return root


@pytest.fixture
def twins(originals, tmp_path):
    "A copy that a test may spoil."
    return Path(shutil.copytree(originals, tmp_path / "twins"))


def load_twin(name, root, **options):
    return data.load(f"phantom:{name}", root, patch=64, **options)


def found(name, root):
    return [(problem.file, problem.kind) for problem in data.verify(f"phantom:{name}", root)]


# twins ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", LAYOUTS)
def test_twin_is_in_order(name, originals):
    splits = load_twin(name, originals)
    assert found(name, originals) == []
    assert (splits.name, splits.phantom, splits.classes) == (f"phantom-{name}", True, ("background", "vessel"))
    for item in [*splits.val, *splits.test]:
        assert item["image"].shape == (1, *SIZE) and item["image"].dtype == torch.float32
        assert item["label"].shape == SIZE and item["label"].unique().tolist() == [0, 1]
        assert item["fov"].dtype == torch.bool and 0 <= item["image"].min() and item["image"].max() <= 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_twin_is_reproducible(name, originals, tmp_path):
    again = data.phantom(name, tmp_path, FEW[name], SIZE)
    files = [path.relative_to(again) for path in again.rglob("*") if path.is_file()]
    assert len(files) == len([p for p in (originals / again.name).rglob("*") if p.is_file()])
    assert all((again / f).read_bytes() == (originals / again.name / f).read_bytes() for f in files)
    assert load_twin(name, tmp_path).sha256 == load_twin(name, originals).sha256


def test_seed_changes_every_photograph(originals, tmp_path):
    other = data.phantom("stare", tmp_path, FEW["stare"], SIZE, seed=1)
    for case in FEW["stare"]:
        name = STARE.files(case)["image"]
        assert (other / name).read_bytes() != (originals / "STARE" / name).read_bytes()


def test_phantom_is_refused_elsewhere(twins, tmp_path):
    with pytest.raises(FileExistsError, match="not empty"):
        data.phantom("stare", twins, FEW["stare"], SIZE, seed=1)
    (tmp_path / "mine/STARE").mkdir(parents=True)
    (tmp_path / "mine/STARE/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        data.phantom("stare", tmp_path / "mine", FEW["stare"], SIZE)
    assert [p.name for p in (tmp_path / "mine/STARE").iterdir()] == ["thesis.txt"]


def test_real_name_refuses_phantom(originals):
    for act in (data.load, data.verify):
        with pytest.raises(ValueError, match="holds a phantom twin"):
            act("chasedb1", originals)


def test_load_makes_twin_in_cache_only(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_DATA", str(tmp_path / "data"))
    monkeypatch.setitem(data.DATASETS, "stare", replace(data.DATASETS["stare"], cases=("im0001",), size=SIZE))
    splits = data.load("phantom:stare", root=tmp_path / "data", patch=64)
    assert len(splits.test) == 1 and not (tmp_path / "data").exists()
    folder, = (tmp_path / "cache/phantom").glob("*/STARE")
    assert read_marker(folder)["name"] == "stare"
    assert splits.origin().sha256 == splits.sha256


def write_twin(root):
    data.phantom("chasedb1", root, FEW["chasedb1"], SIZE)


def test_two_processes_make_one_twin(tmp_path, originals):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_twin, args=(tmp_path / "race",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [p.name for p in (tmp_path / "race").iterdir()] == ["CHASEDB1"]
    assert load_twin("chasedb1", tmp_path / "race").sha256 == load_twin("chasedb1", originals).sha256


def test_phantom_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set MEDKD_CACHE"):
        data.load("phantom:stare")


# training items ------------------------------------------------------------------------------------

def test_patches_hold_vessels_and_repeat(originals):
    train = load_twin("chasedb1", originals, patches_per_image=5).train
    assert len(train) == 10
    for index in range(10):
        item = train.sample(index, np.random.default_rng(index))
        assert item["image"].shape == (1, 64, 64) and item["label"].float().mean() >= .02
        again = train.sample(index, np.random.default_rng(index))
        assert all(torch.equal(item[key], again[key]) for key in ("image", "label", "fov"))
        assert torch.equal(train[index]["image"], train[index]["image"])


def test_batches_through_workers(originals):
    splits = pickle.loads(pickle.dumps(load_twin("drive", originals)))
    batch = next(iter(DataLoader(splits.train, 4, collate_fn=collate, num_workers=2)))
    assert batch["image"].shape == (4, 1, 64, 64) and batch["label"].dtype == torch.int64
    assert batch["case"] == ["21_training"] * 4 and batch["fov"].shape == (4, 64, 64)


def test_second_observer(originals):
    for name in LAYOUTS:
        first, second = (load_twin(name, originals, observer=n) for n in (1, 2))
        assert first.sha256 != second.sha256
        assert first.test[0]["label"].sum() > second.test[0]["label"].sum() > 0


# bad copies ----------------------------------------------------------------------------------------

def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def resave(path, change):
    "Write changed pixels in the format of the file."
    pixels, buffer = change(decode(path, "L")), io.BytesIO()
    kind = {".png": "PNG", ".gz": "PPM", ".gif": "GIF"}[path.suffix]
    Image.fromarray(pixels).save(buffer, kind)
    path.write_bytes(gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue())


@pytest.mark.parametrize("role", ["image", "label", "label2", "fov"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_truncated(name, role, twins):
    layout, case = LAYOUTS[name], FEW[name][-1]
    if file := layout.files(case).get(role):
        truncate(twins / data.DATASETS[name].folder / file)
        assert found(name, twins) == [(file, "damaged")]
        with pytest.raises(ValueError, match=f"(?s){file}.*medkd verify phantom:{name}"):
            load_twin(name, twins, observer=2 if role == "label2" else 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_mask_of_another_size(name, twins):
    file = LAYOUTS[name].files(FEW[name][-1])["label"]
    resave(twins / data.DATASETS[name].folder / file, lambda x: x[:-3])
    assert found(name, twins) == [(file, "size")]
    with pytest.raises(ValueError, match=rf"{file}: the mask is \(87, 96\), its image \(90, 96\)"):
        load_twin(name, twins)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_of_no_observer(name, twins):
    file = LAYOUTS[name].files(FEW[name][-1])["label"]
    resave(twins / data.DATASETS[name].folder / file, lambda x: np.where(x > 0, 128, 0).astype(np.uint8))
    assert found(name, twins) == [(file, "values")]
    with pytest.raises(ValueError, match=f"{file}: holds .128., expected 0 and 255"):
        load_twin(name, twins)


@pytest.mark.parametrize("role", ["image", "label", "label2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_repeated(name, role, twins):
    folder, files = twins / data.DATASETS[name].folder, LAYOUTS[name].files
    first, second = (files(case)[role] for case in FEW[name][-2:])
    shutil.copy(folder / first, folder / second)
    assert found(name, twins) == [(second, "duplicate")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_and_stray(name, twins):
    folder, files = twins / data.DATASETS[name].folder, LAYOUTS[name].files(FEW[name][-1])
    stray = files["image"].replace(FEW[name][-1], "another")
    shutil.copy(folder / files["image"], folder / stray)
    (folder / files["label"]).unlink()
    assert sorted(found(name, twins)) == sorted([(files["label"], "missing"), (stray, "duplicate")])
    resave_rgb = Image.fromarray(decode(folder / files["image"], "RGB")[::-1])
    buffer = io.BytesIO()
    resave_rgb.save(buffer, {".jpg": "JPEG", ".gz": "PPM", ".tif": "TIFF"}[Path(stray).suffix])
    (folder / stray).write_bytes(gzip.compress(buffer.getvalue()) if stray.endswith("gz") else buffer.getvalue())
    assert (stray, "unexpected") in found(name, twins)
    with pytest.raises(FileNotFoundError, match=rf"1 of \d+ files are missing, first {files['label']}"):
        load_twin(name, twins)


def test_half_copied(twins):
    shutil.rmtree(twins / "DRIVE/training")
    assert len(found("drive", twins)) == 6
    with pytest.raises(FileNotFoundError, match="6 of 12 files are missing, first training/images"):
        load_twin("drive", twins)


def test_current_archive_of_drive(twins, capsys):
    shutil.rmtree(twins / "DRIVE/test/1st_manual")
    shutil.rmtree(twins / "DRIVE/test/2nd_manual")
    splits = load_twin("drive", twins)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (16, 1, 0)
    assert "2 photographs left out" in capsys.readouterr().out
    assert found("drive", twins) == []


def test_damaged_cache_is_repaired(originals, tmp_path, capsys):
    before = load_twin("stare", originals).test[0]["image"]
    for entry in (tmp_path / "cache/arrays").iterdir():
        truncate(entry)
    after = load_twin("stare", originals).test[0]["image"]
    assert torch.equal(before, after) and capsys.readouterr().out.count("damaged cache entry") == 2


def test_unwritable_cache_is_done_without(originals, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "file"))
    assert len(load_twin("stare", originals).test) == 2
    assert "set MEDKD_CACHE" in capsys.readouterr().out


def test_changed_file_is_read_again(twins):
    before = load_twin("stare", twins)
    file = twins / "STARE" / STARE.files("im0001")["label"]
    resave(file, lambda x: np.roll(x, 7, 1))
    after = load_twin("stare", twins)
    assert before.sha256 != after.sha256
    assert not torch.equal(before.test[0]["label"], after.test[0]["label"])


# names, options, folders ---------------------------------------------------------------------------

def test_unknown_name_and_option(originals):
    with pytest.raises(KeyError, match="did you mean.*chasedb1"):
        data.load("chase_db1")
    with pytest.raises(TypeError, match="did you mean patch"):
        data.load("phantom:chasedb1", originals, pach=64)
    with pytest.raises(TypeError, match="expected int"):
        data.load("phantom:chasedb1", originals, patch=64.)
    with pytest.raises(ValueError, match="observer=3"):
        load_twin("chasedb1", originals, observer=3)
    with pytest.raises(ValueError, match="smaller than patch=128"):
        data.load("phantom:chasedb1", originals)


def test_registration_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("drive", tmp_path)
    for part in (tmp_path / "DRIVE", "https://drive.grand-challenge.org/", "account", "'phantom:drive'"):
        assert str(part) in str(error.value)
    assert list(tmp_path.iterdir()) == []


# downloads -----------------------------------------------------------------------------------------

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    "A folder that a local server gives out, and its address."
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def publish(name, folder, served, monkeypatch):
    "Pack a twin as the publisher packs the real one; its checksums become the manifest."
    place, address = served
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "PHANTOM"]
    if name == "chasedb1":
        with zipfile.ZipFile(place / "CHASEDB1.zip", "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
    else:
        for part in ("stare-images", "labels-ah", "labels-vk"):
            with tarfile.open(place / f"{part}.tar", "w") as archive:
                for path in (folder / part).iterdir():
                    archive.add(path, path.name)
    archives = tuple(Archive(f"{address}/{path.name}", path.name) for path in sorted(place.iterdir()))
    manifest = {str(path.relative_to(folder)): content_sha256(path) for path in files}
    for module in ("medkd.data", "medkd.data.fetch"):
        monkeypatch.setattr(f"{module}.read_manifest", lambda _: manifest)
    layout = LAYOUTS[name]
    few = replace(layout, **{part: tuple(c for c in getattr(layout, part) if c in FEW[name])
                             for part in ("train", "val", "test")})
    source = data.DATASETS[name]
    monkeypatch.setitem(data.DATASETS, name, replace(
        source, archives=archives, loader=functools.partial(source.loader.func, few),
        checker=functools.partial(source.checker.func, few)))
    return manifest


@pytest.mark.parametrize("name", ["chasedb1", "stare"])
def test_download(name, originals, served, tmp_path, monkeypatch):
    folder = data.DATASETS[name].folder
    publish(name, originals / folder, served, monkeypatch)
    splits = data.load(name, tmp_path / "data", patch=64)
    assert splits.sha256 == load_twin(name, originals).sha256 and not splits.phantom
    assert data.verify(name, tmp_path / "data") == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == [folder]


def test_download_of_other_files(originals, served, tmp_path, monkeypatch):
    manifest = publish("chasedb1", originals / "CHASEDB1", served, monkeypatch)
    manifest["Image_01L.jpg"] = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(ValueError, match="1 of 12 files .* first Image_01L.jpg; nothing was kept"):
        data.load("chasedb1", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_download_with_wrong_checksum(originals, served, tmp_path, monkeypatch):
    publish("chasedb1", originals / "CHASEDB1", served, monkeypatch)
    source = data.DATASETS["chasedb1"]
    archives = (replace(source.archives[0], sha256="0" * 64),)
    monkeypatch.setitem(data.DATASETS, "chasedb1", replace(source, archives=archives))
    with pytest.raises(ValueError, match="hash"):
        data.load("chasedb1", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = data.DATASETS["stare"]
    archives = (Archive("http://127.0.0.1:9/stare-images.tar", "stare-images.tar"),)
    monkeypatch.setitem(data.DATASETS, "stare", replace(source, archives=archives))
    with pytest.raises(FileNotFoundError) as error:
        data.load("stare", tmp_path / "data")
    for part in (tmp_path / "data/STARE", source.page, "Fetching it failed", "'phantom:stare'"):
        assert str(part) in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


def test_changed_file_is_named(originals, served, tmp_path, monkeypatch):
    publish("chasedb1", originals / "CHASEDB1", served, monkeypatch)
    data.load("chasedb1", tmp_path / "data", patch=64)
    file = tmp_path / "data/CHASEDB1/Image_01L_1stHO.png"
    resave(file, lambda x: np.roll(x, 1, 0))
    assert [(p.file, p.kind) for p in data.verify("chasedb1", tmp_path / "data")] == [(file.name, "changed")]


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:\\out.txt"])
def test_zip_stays_in_its_folder(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr(name, "bad")
    with pytest.raises(ValueError, match="nothing was unpacked"):
        safe_extract(tmp_path / "a.zip", tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_zip_without_links(tmp_path):
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="a link"):
        safe_extract(tmp_path / "a.zip", tmp_path / "in")


# the real data sets --------------------------------------------------------------------------------

REAL = [pytest.param(name, marks=pytest.mark.skipif(
    not (data_root() / data.DATASETS[name].folder).is_dir(),
    reason=f"MEDKD_DATA holds no {data.DATASETS[name].folder}")) for name in LAYOUTS]


@pytest.mark.parametrize("name", REAL)
def test_real_copy_is_in_order(name):
    problems = data.verify(name)
    assert problems == []
    assert problems.files == dict(chasedb1=84, stare=60, drive=140)[name]


@pytest.mark.parametrize("name", REAL)
def test_real_splits(name):
    splits = data.load(name)
    parts = (splits.train, splits.val, splits.test)
    assert [len(part.cases) for part in parts] == dict(
        chasedb1=[18, 2, 8], stare=[0, 0, 20], drive=[18, 2, 20])[name]
    assert not any(set(a.patients) & set(b.patients) for a, b in combinations(parts, 2))
    assert not splits.phantom and splits.unit == "px" and splits.name == name
    for item in splits.test:
        share = item["label"][item["fov"]].float().mean()
        assert .03 < share < .2 and item["label"].sum() * .99 < item["label"][item["fov"]].sum()


@pytest.mark.parametrize("name", REAL[2:])
def test_field_of_view_agrees_with_the_masks_of_drive(name):
    for case in DRIVE.cases:
        pixels, _ = inspect(data_root() / "DRIVE", DRIVE.files(case))
        own, computed = pixels["fov"] > 127, field_of_view(pixels["image"])
        assert 2 * (own & computed).sum() / (own.sum() + computed.sum()) > .985


@pytest.mark.parametrize("name", REAL[:1])
def test_real_copy_with_a_truncated_image(name, tmp_path):
    folder = Path(shutil.copytree(data_root() / "CHASEDB1", tmp_path / "CHASEDB1"))
    file = folder / "Image_12L.jpg"
    file.chmod(0o644)
    truncate(file)
    assert [(p.file, p.kind) for p in data.verify(name, tmp_path)] == [(file.name, "damaged")]
    with pytest.raises(ValueError, match="(?s)Image_12L.jpg.*python -m medkd verify chasedb1"):
        data.load(name, tmp_path)
