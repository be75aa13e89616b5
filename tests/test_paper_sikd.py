"""papers/sikd.ipynb as a user meets it: a whole run on a small phantom, other data, wrong parameters, bad images and labels."""
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from notebooks import PAPERS, Cells, alone, smoke_run
from test_slices_data import TRAINING, frame, resave

from medkd.data import phantom
from medkd.data.base import Splits, collate, data_root
from medkd.data.targets import second_folder
from medkd.data.task_slices import load_task_slices
from medkd.files import read_json
from medkd.losses.sikd import SIKD, averaged, classwise_mean
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit

NOTEBOOK = PAPERS/"sikd.ipynb"
NOTE = "phantom data, smoke preset"
ORACLE = "teacher (oracle)"
METHODS = ("sikd", "kd", "at", "cwd", "dist", "skd", "ifvd")
TARGET = "phantom-acdc-others-shift-1"
DRAWN = {"class_means", "examples", "curves_alone", "curves_distilled", "shares", "features", "scores", "overlays_phantom-acdc", f"overlays_{TARGET}",
         "robustness", "shifted", "cost"}
HEARTS = ["patient001", "patient003", "patient002", "patient004"]


@pytest.fixture(scope="session")
def twins(shared):
    "A data root with a small twin, made once for all processes of this test run."
    with alone(shared/"sikd_twins.lock"): phantom("acdc", shared/"sikd_twins", HEARTS, (3, 48, 40))
    return shared/"sikd_twins"


@pytest.fixture(scope="session")
def done(shared, twins):
    "The smoke run of one process of this test run."
    return smoke_run(shared, NOTEBOOK, data_root=twins, rules="published")


@pytest.fixture
def results(done):
    assert done.code == 0, done.text[-3000:]
    return done.folder/"runs/sikd/phantom-acdc"


def kinds(cell): return [set(output.get("data", {})) for output in cell.outputs]


def test_every_cell_ran(done):
    assert done.code == 0, done.text[-3000:]
    assert [cell.execution_count for cell in done.cells] == list(range(1, len(done.cells) + 1))
    assert "Warning" not in "".join(output.text for cell in done.cells for output in cell.outputs if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook_and_in_its_folder(done, results):
    assert {path.stem for path in (results/"figures").glob("*.png")} == DRAWN
    assert sum("image/png" in kind for cell in done.cells for kind in kinds(cell)) == len(DRAWN) + 1 # the panel's
    panel, = (cell for cell in done.cells if "change_panel(" in cell.source and "import" not in cell.source)
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds(panel))


def test_tables_name_the_oracle_and_what_they_are_of(done, results):
    tables = [output.data["text/html"] for cell in done.cells for output in cell.outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 12 and all(NOTE in table for table in tables)
    assert not any("<td>teacher</td>" in table or "<th>teacher</th>" in table for table in tables)
    rows = pd.read_csv(results/"scores.csv")
    assert list(rows["method"]) == [ORACLE, "student", *METHODS] and set(rows["hd95 in"]) == {"mm"}
    across = pd.read_csv(results/"across.csv")
    assert set(across["dataset"]) == {TARGET} and list(across["method"]) == [ORACLE, "student", *METHODS]
    about = read_json(results/"results.json")
    assert list(about["runs"]) == [ORACLE, "student", *METHODS] and all(facts["phantom"] for facts in about["data"].values())


def test_classes_and_robustness(results):
    classes = pd.read_csv(results/"classes.csv", header=[0, 1], index_col=[0, 1])
    assert {name for name, _ in classes.columns} == {"dice", "hd95 (mm)"} and {c for _, c in classes.columns} == {"right ventricle", "myocardium", "left ventricle"}
    robust = pd.read_csv(results/"robustness.csv", index_col=0)
    assert [float(s) for s in robust] == [0, 1, 2] and list(robust.index) == [ORACLE, "student", *METHODS]


def test_the_paper_stands_beside_a_phantom_without_a_difference(results):
    beside = pd.read_csv(results/"paper.csv")
    assert len(beside) == 30 and set(beside["ours"]) == {"not run"} and beside["difference"].isna().all()
    heart = beside[beside["metric"] == "heart, other data set"].set_index("method")["paper"]
    assert heart["sikd - student"] == 9.89 and abs(heart["sikd"] - heart["student"] - 9.89) < .3


def test_what_the_oracle_was_shown(results):
    params = {path.name.rpartition("-")[0]: read_json(path/"params.json")["decided"] for path in results.iterdir() if (path/"params.json").exists()}
    assert set(params) == {"teacher", "student", *METHODS}
    shown = params["teacher"]["student_input"]
    assert shown["call"] == "medkd.losses.sikd:averaged" and shown["kwargs"] == dict(num_classes=4)
    assert params["student"]["student_input"] is None and all(params[name]["student_input"] is None and params[name]["teacher_input"] == shown for name in METHODS)
    assert params["sikd"]["weights"] == dict(seg=1., sikd=2.)


# cell by cell --------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(steps="many"), TypeError, "steps='many'.*expected int or None"),
    (dict(datset="acdc"), KeyError, "unknown parameter 'datset'; did you mean dataset"),
    (dict(dataset="acdcc"), ValueError, "unknown dataset 'acdcc'; did you mean acdc"),
    (dict(methods="kd,skid"), KeyError, "unknown method 'skid'; did you mean .*sikd"),
    (dict(methods="sikd,sikd"), ValueError, "names a method twice"),
    (dict(student="unett"), KeyError, "unknown network 'unett'; did you mean unet"),
    (dict(size=100), ValueError, "unknown size 100"),
    (dict(loss="dice"), ValueError, "unknown loss 'dice'; did you mean dice_ce"),
    (dict(shifts="strong"), ValueError, "'strong'; expected numbers"),
    (dict(shift=-1.), ValueError, "shift=-1.0; expected 0 or more"),
    (dict(dataset="nnunet"), ValueError, "dataset='nnunet' needs a folder"),
    (dict(nnunet_folder="here"), ValueError, "nnunet_folder='here'.*needs a folder, and no other takes one"),
    (dict(dataset="chasedb1", target_root="there"), ValueError, "target_root does not go with chasedb1"),
    (dict(teacher_weights="t.safetensors", teacher_steps=5), ValueError, "teacher_weights.*teacher_steps.*contradict"),
])
def test_bad_parameter(here, parameters, kind, expected):
    with pytest.raises(kind, match=expected): Cells(NOTEBOOK, **parameters).run_to("METHODS =")
    assert not list(here.rglob("params.json"))


def test_missing_folders_are_named_before_training(here, twins):
    for parameters, expected in ((dict(target_root="nowhere"), "no second data set in .*nowhere: expected a folder in the layout of ACDC"),
                                 (dict(dataset="nnunet", nnunet_folder="nowhere"), "nowhere is no raw folder of nnU-Net"),
                                 (dict(dataset="acdc"), "ACDC is expected in .*'phantom:acdc'")):
        with pytest.raises(FileNotFoundError, match=expected):
            Cells(NOTEBOOK, preset="smoke", **dict(data_root=str(twins) if "dataset" not in parameters else "empty", **parameters)).run_to("unit_of =")
    assert not list(here.rglob("params.json"))


TINY = dict(preset="smoke", methods="sikd", teacher_steps=1, steps=1, shifts="1")
PICTURES = ["class_means", '"examples"', "curves_alone", "curves_distilled", '"shares"', '"features"', "apart =", '"scores"']


def ran(until="across_differences =", skip=(), **parameters):
    cells = Cells(NOTEBOOK, **TINY | parameters)
    return cells.run_to(until, skip=[*PICTURES, *skip])


def test_the_other_methods_train(here, twins):
    made = ran("for name in wanted: trained", skip=["samples ="], data_root=str(twins), methods="dkd,nkd,cirkd,vid,hlfd,emkd")
    assert {name: set(made["trained"][name].metrics("train")[0]["losses"]) for name in made["wanted"]} == dict(
        dkd={"seg", "dkd"}, nkd={"seg", "nkd"}, cirkd={"seg", "kd", "minibatch", "pixel", "region"}, vid={"seg", "vid"},
        hlfd={"seg", "pixel", "feature"}, emkd={"seg", "pmd", "imd", "rad"})


def test_a_second_data_set(here, twins):
    phantom("acdc", here/"mnms", ["patient005", "patient021"], (3, 40, 48))
    made = ran("beside =", data_root=str(twins), target_root=str(here/"mnms"))
    assert {row["dataset"] for row in made["outside"]} == {"phantom-acdc-mnms"} and {row["case"] for row in made["outside"]} == set(made["targets"][0].test.volumes)
    assert {row["patient"] for row in made["outside"]} == {"patient005", "patient021"}


def test_fundi(here, fundi):
    made = ran(dataset="phantom:chasedb1", data_root=str(fundi), size=64)
    assert list(made["tests"]) == ["phantom-chasedb1", "phantom-stare", "phantom-drive"] and set(made["unit_of"].values()) == {"pixels"}
    assert list(made["per_class"].columns) == [("dice", "vessel"), ("hd95 (pixels)", "vessel")]


def test_a_folder_of_nnunet(here):
    root = phantom("nnunet", here/"there", [f"case_{n:03d}" for n in range(4)], (20, 24, 6))
    (root/"PHANTOM").unlink()
    made = ran(dataset="nnunet", nnunet_folder=str(root))
    assert made["source"].name == "nnunet-Dataset900_Phantom" and made["channels"] == 2
    assert list(made["tests"]) == ["nnunet-Dataset900_Phantom", "nnunet-Dataset900_Phantom-shift-1"]
    assert [c for _, c in made["per_class"].columns][:3] == ["necrotic", "oedema", "enhancing"]


# what images and labels may be like ----------------------------------------------------------------

class Case:
    "A data set of given labels."
    def __init__(self, name, labels): self.name, self.labels = name, labels

    def __len__(self): return len(self.labels)

    def __getitem__(self, i):
        image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(i))
        return dict(image=image, label=self.labels[i], case=f"{self.name}{i}")


def both_stages(folder, train):
    "The oracle and its student, two steps each, on these labels."
    whole = torch.arange(256).view(16, 16) % 3
    splits = Splits("labels", Case("t", train), Case("v", [whole]), Case("s", [whole]), ("background", "a", "b"))
    show = partial(averaged, num_classes=3)
    alone = Recipe(data=splits, student=partial(build, "unet", 1, 3, .0625), terms=(partial(Seg, F.cross_entropy),), weights=dict(seg=1), steps=2, batch_size=2, precision="fp32")
    oracle = fit(replace(alone, student=partial(build, "unet_noskip", 1, 3, .0625), student_input=show), folder/"teacher")
    return fit(replace(alone, teacher=oracle, teacher_input=show, terms=(*alone.terms, SIKD), weights=dict(seg=1, sikd=2.)), folder/"student")


@pytest.mark.parametrize("present", [(0,), (0, 1), (2,)], ids=["only background", "a class without a pixel", "no background"])
def test_classes_that_no_slice_has(present, tmp_path):
    rng = torch.Generator().manual_seed(0)
    labels = [torch.tensor(present)[torch.randint(len(present), (16, 16), generator=rng)] for _ in range(4)]
    rows = both_stages(tmp_path, labels).metrics("train")
    assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row["losses"].values())
    batch = collate([dict(image=torch.rand(1, 16, 16), label=label, case="a") for label in labels])
    assert torch.equal(averaged(batch, num_classes=3).flatten(2)[0, 0].unique(), classwise_mean(batch["image"], batch["label"], 3)[0].unique())
    assert len(averaged(batch, num_classes=3)[0].unique()) == len(present)


def test_labels_beyond_the_classes_stop_before_training(here):
    label = torch.zeros(16, 16, dtype=torch.long)
    label[3:5] = 7
    with pytest.raises(ValueError, match=r"train\[0\]: label holds 0, 7; expected 0 to 2"): both_stages(here, [label] * 2)
    root = phantom("nnunet", here/"there", [f"case_{n:03d}" for n in range(4)], (20, 24, 6))
    resave(root/"labelsTr/case_002.nii.gz", lambda x: x + 3)
    with pytest.raises(ValueError, match="(?s)labelsTr/case_002.nii.gz.*the classes are 0, 1, 2, 3"): load_task_slices(root, 16)
    (root/"labelsTr/case_002.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="labelsTr/case_002.nii.gz"): load_task_slices(root, 16)


def test_a_second_data_set_that_is_incomplete(here, cache):
    root = phantom("acdc", here/"other", ["patient005", "patient021"], (3, 40, 48)).parent
    (root/"ACDC/PHANTOM").unlink()
    second_folder("acdc", root, size=32)
    frame(root, "patient005", "_gt").unlink()
    with pytest.raises(ValueError, match="(?s)patient005_frame01_gt.nii.gz: its image is here"): second_folder("acdc", root, size=32)
    frame(root, "patient005").unlink()
    with pytest.raises(ValueError, match="patient005: frames here: patient005_frame0.; expected ED and ES"): second_folder("acdc", root, size=32)
    shutil.rmtree(root/"ACDC"/TRAINING)
    with pytest.raises(ValueError, match="no patient in .*put patient001 and so on there"): second_folder("acdc", root, size=32)


@pytest.mark.skipif(not (data_root()/"ACDC"/TRAINING).is_dir(), reason="MEDKD_DATA holds no ACDC")
def test_real_hearts_of_a_few_patients(here):
    for patient in HEARTS: shutil.copytree(data_root()/"ACDC"/TRAINING/patient, here/"few/ACDC"/TRAINING/patient)
    made = ran(dataset="acdc", data_root=str(here/"few"), target_root=str(here/"few"), until="beside =")
    assert set(made["unit_of"].values()) == {"voxels"} and not made["source"].phantom
    heart = made["beside"].set_index(["metric", "method"])
    gain = heart.loc["heart, same data set", "sikd - student"]
    assert gain["ours"] == pytest.approx(made["class_mean"]("sikd", "acdc") - made["class_mean"]("student", "acdc")) and gain["difference"] == pytest.approx(gain["ours"] - 1.02)
    assert set(heart.loc["polyps, same data set", "ours"]) == {"not run"}
