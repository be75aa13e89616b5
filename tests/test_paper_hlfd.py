"""papers/hlfd.ipynb as a user meets it: a whole run on a small phantom, other data and networks, bad input."""
import io
from base64 import b64decode

import numpy as np
import pandas as pd
import pytest
from notebooks import PAPERS, Cells, alone, smoke_run
from PIL import Image

from medkd.files import read_json

NOTEBOOK = PAPERS/"hlfd.ipynb"
NOTE = "phantom data, smoke preset"
METHODS = ("kd", "at", "emkd", "hilbert", "attn_kd", "wo_feedback", "deep_kd", "indv_feedback", "cat_feedback", "hlfd")
ROLES = ("teacher", "student", *METHODS)
DRAWN = {"training_samples", "examples", "links", "curves_alone", "curves_distilled", "shares", "attention", "activation", "scores",
         "overlays", "samples", "ablation", "cost"}
KIDNEYS = [f"case_{k:05d}" for k in (1, 2, 5, 0, 6, 17)]


@pytest.fixture(scope="session")
def twins(shared):
    "A data root with small twins, made once for all processes of this test run."
    from medkd.data import phantom
    with alone(shared/"hlfd_twins.lock"):
        phantom("kits19", shared/"hlfd_twins", KIDNEYS, (4, 64, 64))
        phantom("acdc", shared/"hlfd_twins", ["patient001", "patient003", "patient002", "patient004"], (3, 64, 64))
        phantom("chaos", shared/"hlfd_twins", ["1", "2"], (3, 64, 64))
    return shared/"hlfd_twins"


@pytest.fixture(scope="session")
def done(shared, twins):
    "The smoke run of one process of this test run."
    return smoke_run(shared, NOTEBOOK, data_root=twins, protocol="published")


@pytest.fixture
def results(done):
    assert done.code == 0, done.text[-3000:]
    return done.folder/"runs/hlfd/phantom-kits19"


def kinds(cell): return [set(output.get("data", {})) for output in cell.outputs]


def test_every_cell_ran(done):
    assert done.code == 0, done.text[-3000:]
    assert [cell.execution_count for cell in done.cells] == list(range(1, len(done.cells) + 1))
    assert "Warning" not in "".join(output.text for cell in done.cells for output in cell.outputs if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook_and_in_its_folder(done, results):
    pictures = [output.data["image/png"] for cell in done.cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert {path.stem for path in (results/"figures").glob("*.png")} == DRAWN
    assert len(pictures) == len(DRAWN) + 1 # the panel's
    for picture in pictures: assert np.asarray(Image.open(io.BytesIO(b64decode(picture))).convert("L"), np.float32).std() > 1
    panel, = (cell for cell in done.cells if "layer_panel(" in cell.source and "import" not in cell.source)
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds(panel))


def test_tables_say_what_they_are_of(done, results):
    tables = [output.data["text/html"] for cell in done.cells for output in cell.outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 8 and sum(NOTE in table for table in tables) == 7 # the published networks' cost is of no run
    about = read_json(results/"results.json")
    assert tuple(about["runs"]) == ROLES and about["data"]["phantom-kits19"]["phantom"]


def test_all_slices_count_and_all_scores_are_there(results):
    scores = pd.read_csv(results/"scores.csv")
    assert list(scores["method"]) == list(ROLES) and {"dice", "voe", "rvd", "hd95", "assd"} <= set(scores) and set(scores["n"]) == {3}
    stored = [path for path in (next(results.glob("hlfd-????????"))/"predictions/phantom-kits19").glob("*.png")]
    assert len(stored) == 3 * 4


def test_the_released_protocol_stands_beside_the_standard_one(results):
    released = pd.read_csv(results/"released.csv", index_col=0)
    assert list(released.index) == list(ROLES)
    assert list(released) == ["Dice (released)", '"VOE" (released)', "RVD, signed (released)", *(f"{name} (standard)" for name in ("dice", "voe", "rvd", "hd95", "assd"))]
    assert released["voe (standard)"].between(0, 1).all() and (released["voe (standard)"] != released['"VOE" (released)']).any()


def test_published_gains_stand_beside_a_phantom_without_a_difference(results):
    beside = pd.read_csv(results/"paper.csv")
    assert list(beside["paper"]) == [10., 32.6] and set(beside["ours"]) == {"not run"} and beside["difference"].isna().all()


def test_objectives_and_parts_are_trained_as_their_table_says(done, results):
    roles = [path.name.rpartition("-")[0] for path in results.iterdir() if (path/"report.json").exists()]
    assert {name: roles.count(name) for name in set(roles)} == dict.fromkeys(ROLES, 1) | dict(hlfd_part=4)
    weights = {path.name.rpartition("-")[0]: read_json(path/"params.json")["decided"]["weights"] for path in results.glob("*-????????")}
    assert weights["hlfd"] == dict(seg=1, pixel=.1, feature=.9) and weights["attn_kd"] == dict(seg=1, feature=1)
    said, = (output.text for cell in done.cells for output in cell.outputs if "the ablation trains" in output.get("text", ""))
    assert said.startswith("the ablation trains 4 more students, about") and "min here (on)" in said


# cell by cell --------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("MEDKD_DATA", str(tmp_path/"data"))
    return tmp_path


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(steps="many"), TypeError, "steps='many'.*expected int or None"),
    (dict(datset="acdc"), KeyError, "unknown parameter 'datset'; did you mean dataset"),
    (dict(dataset="kits"), ValueError, "unknown dataset 'kits'; did you mean kits19"),
    (dict(methods="kd,hlfb"), KeyError, "unknown method 'hlfb'; did you mean hlfd"),
    (dict(methods="kd,kd"), ValueError, "names a method twice"),
    (dict(student="resnet_18"), ValueError, "unknown student 'resnet_18'; did you mean resnet18"),
    (dict(teacher="enet"), ValueError, "unknown teacher 'enet'"), # it lacks layers that HLFD pairs
    (dict(size=100), ValueError, "unknown size 100"),
    (dict(foreground=4), ValueError, "unknown foreground 4; there are: 1, 2, 3"),
    (dict(window="wide"), ValueError, "'wide'; expected numbers"),
    (dict(protocol="paper"), ValueError, "unknown protocol 'paper'"),
    (dict(projector="frozen"), ValueError, "unknown projector 'frozen'"),
    (dict(methods="kd", ablation=True), ValueError, "ablation=True takes the parts of hlfd"),
    (dict(ablation="yes"), TypeError, "ablation='yes'.*expected bool or None"),
    (dict(teacher_weights="t.safetensors", teacher_steps=5), ValueError, "teacher_weights.*teacher_steps.*contradict"),
])
def test_bad_parameter(here, parameters, kind, expected):
    with pytest.raises(kind, match=expected): Cells(NOTEBOOK, **parameters).run_to("METHODS |=")
    assert not list(here.rglob("params.json"))


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(window="300,-200"), ValueError, r"window=\(300, -200\); expected .*low below high"),
    (dict(window="0,0"), ValueError, "low below high"),
    (dict(window="400"), ValueError, "low below high"),
    (dict(dataset="phantom:acdc", window="0,1"), TypeError, "acdc: unknown option 'window'"),
    (dict(dataset="phantom:kits19", foreground=2), TypeError, "kits19: unknown option 'foreground'"),
    (dict(dataset="phantom:chaos"), ValueError, "labelled patients found: 2 .*at least 3 are needed"),
    (dict(dataset="kits19", data_root="nowhere"), FileNotFoundError, "(?s)KiTS19 is expected in .*neheller/kits19.*phantom:kits19"),
    (dict(dataset="acdc"), ValueError, "holds a phantom twin, not ACDC"),
])
def test_data_that_cannot_be_had_as_asked(here, twins, parameters, kind, expected):
    with pytest.raises(kind, match=expected): Cells(NOTEBOOK, **dict(preset="smoke", data_root=str(twins)) | parameters).run_to("source = load")
    assert not list(here.rglob("params.json"))


TINY = dict(preset="smoke", methods="emkd,hlfd", teacher_steps=1, steps=1, ablation=False)


@pytest.mark.parametrize("parameters", [dict(teacher="raunet", student="unet_resnet18"), dict(teacher="unet_resnet18", student="mobile_unet", projector="random", loss="dice_ce")])
def test_other_networks(here, twins, parameters):
    cells = Cells(NOTEBOOK, data_root=str(twins), **TINY, **parameters)
    made = cells.run_to("for name, (terms, weights) in wanted.items()", skip=["samples =", "curves_alone", "show_links("])
    assert {name: set(made["trained"][name].metrics("train")[0]["losses"]) for name in made["wanted"]} == dict(
        emkd={"seg", "pmd", "imd", "rad"}, hlfd={"seg", "pixel", "feature"})


def test_a_structure_of_the_heart(here, twins):
    cells = Cells(NOTEBOOK, data_root=str(twins), dataset="phantom:acdc", protocol="published", foreground=1, **TINY)
    made = cells.run_to("GAINS =", skip=["curves_alone", "curves_distilled", "show_shares(", 'figure("scores"', "show_links(", '"attention"', '"activation"'])
    assert made["source"].classes == ("background", "right ventricle") and set(made["released"].index) == {"teacher", "student", "emkd", "hlfd"}
    assert {row["metric"] for row in made["rows"]} == {"dice", "voe", "rvd", "hd95", "assd"} and made["source"].patch == (64, 64)


# a teacher that is no better, a class that is nowhere, labels beyond the classes ---------------------

def test_a_run_without_a_gain_says_so(here):
    from medkd.papers import verdict
    rows = [dict(method=method, dataset="acdc", case=case, metric="dice", value=value) for method, value in (("teacher", .6), ("student", .7)) for case in "ab"]
    assert "cannot show a gain" in verdict(rows, "acdc") and "-0.1000 dice" in verdict(rows, "acdc")


def spoil(root, name, value):
    "Set all labels of a frame of the twin of ACDC to `value` where they are `name`."
    import nibabel
    for path in sorted((root/"ACDC").rglob("*_gt.nii.gz")):
        image = nibabel.load(path)
        labels = np.asarray(image.dataobj).copy()
        labels[labels == name] = value
        nibabel.save(nibabel.Nifti1Image(labels, image.affine, image.header), path)


@pytest.mark.parametrize("foreground, value, kind, expected", [
    (3, 0, ValueError, "no training slice has foreground, of 4 scans, first patient001_frame"), (3, 7, ValueError, "(?s)patient001_frame.*_gt.nii.gz.*7")])
def test_labels_that_cannot_be_trained_on(here, twins, tmp_path, foreground, value, kind, expected):
    import shutil
    root = tmp_path/"spoilt"
    shutil.copytree(twins/"ACDC", root/"ACDC")
    spoil(root, foreground, value)
    with pytest.raises(kind, match=expected):
        Cells(NOTEBOOK, data_root=str(root), dataset="phantom:acdc", foreground=foreground, **TINY).run_to("source = load")
