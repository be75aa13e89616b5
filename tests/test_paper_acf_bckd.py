"""papers/acf_bckd.ipynb as a user meets it: a whole run on the phantom, its numbers from the stored predictions, wrong parameters."""
import ast
import io
import re
import shutil
from base64 import b64decode

import numpy as np
import pytest
import torch
from notebooks import PAPERS, Cells, smoke_run
from PIL import Image

from medkd.files import read_json, read_jsonl
from medkd.models.zoo import build

ACF = PAPERS/"acf_bckd.ipynb"
NOTE = "phantom data, smoke preset"
METHODS = ("kd", "at", "nkd", "skd", "ifvd", "cwd", "dist", "dkd", "cirkd", "acf_bckd")
ROLES = ("teacher", "student", *METHODS)


# a whole run ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def first(shared):
    "The run of one process of this test run, in one folder for all."
    return smoke_run(shared, ACF)


@pytest.fixture
def data(first):
    "The folder of the data set's runs."
    assert first.code == 0, first.text[-3000:]
    return first.folder/"runs/acf_bckd/phantom-btcv"


@pytest.fixture
def results(data): return data/"resunet3d_unet3d_tiny"


def run_folder(data, role):
    found, = data.glob(f"{role}-????????")
    return found


def images(cell):
    "The pictures in a cell's output."
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_every_cell_ran(first):
    assert first.code == 0, first.text[-3000:]
    assert [cell.execution_count for cell in first.cells] == list(range(1, len(first.cells) + 1))
    assert not [output for cell in first.cells for output in cell.outputs if output.output_type == "error"]
    assert "Warning" not in "".join(output.text for cell in first.cells for output in cell.outputs if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook(first, results):
    pictures = [image for cell in first.cells for image in images(cell)]
    kept = {path.stem for path in (results/"figures").glob("*.png")}
    assert kept >= {"training_patches", "boundaries", "attention_correction", "taps", "schedule", "overlay_best", "overlay_worst", "cost", "scores"}
    assert len(pictures) == len(kept) + 1 # the viewer's
    for image in pictures: assert np.asarray(Image.open(io.BytesIO(b64decode(image))).convert("L"), np.float32).std() > 1
    kinds = [set(output.get("data", {})) for cell in first.cells for output in cell.outputs]
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)


def drawing_calls():
    "Calls in the notebook that draw or make a table."
    text = "\n".join(source for source in Cells(ACF).sources if not source.startswith("%"))
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and re.fullmatch(r"show_\w+|\w+_table|slice_viewer|beside", node.func.id)]


def test_every_table_and_figure_says_phantom_and_smoke(first, results):
    tables = [output.data["text/html"] for cell in first.cells for output in cell.outputs if "text/html" in output.get("data", {})]
    assert len(tables) >= 9 and all(NOTE in table for table in tables)
    assert (results/"results.md").read_text().count(NOTE) >= 4 and read_json(results/"results.json")["note"] == NOTE
    calls = drawing_calls()
    assert len(calls) > 15
    for call in calls: assert "note" in {word.arg for word in call.keywords} or "note" in ast.unparse(call.args[-1]), ast.unparse(call)


def test_ten_methods_were_trained_and_wired(data, results):
    about = read_json(results/"results.json")
    assert tuple(about["runs"]) == ROLES and about["data"]["phantom-btcv"]["phantom"]
    for role in ROLES:
        report = read_json(run_folder(data, role)/"report.json")
        assert report == about["runs"][role]["report"] and report["steps"] == 6
        wiring = read_json(run_folder(data, role)/"wiring.json")
        assert all(row["gradient"] > 0 for name, row in wiring.items() if name != "unreached")


def test_the_boundaries_follow_their_schedule(data):
    rows = [row for row in read_jsonl(run_folder(data, "acf_bckd")/"metrics.jsonl") if row["kind"] == "train"]
    assert [row["weights"]["hbd"] for row in rows] == [1, 1, 1, .5, .5, .5]
    assert [row["weights"]["sbd"] for row in rows] == [0, 0, 0, .5, .5, .5]
    assert ["sbd" in row["losses"] for row in rows] == [False] * 3 + [True] * 3
    assert {row["weights"]["afd"] for row in rows} == {25000 * (32**3 / 96**3)}


def test_scores_follow_from_the_stored_predictions(data, results, cache, tmp_path):
    from medkd.data import load
    from medkd.native import score_labels
    from medkd.papers import stored_scores
    from medkd.tables import compare_table, score_table, seed_table
    from medkd.trainers import Run
    copied = shutil.copytree(data, tmp_path/"data")
    for path in copied.rglob("*.safetensors"): path.unlink()
    splits = load("phantom:btcv", patch=(32, 32, 32), patches_per_volume=1, spacing=(8., 8., 8.))
    rows = stored_scores({role: Run(run_folder(copied, role)) for role in ROLES}, {splits.name: splits}, ("dice", "hd95", "assd", "nsd"), score_labels)
    rows = [row | dict(seed=0) for row in rows]
    for name, table in dict(means=seed_table, scores=score_table, differences=compare_table).items():
        assert table(rows, note=NOTE).to_csv() == (results/f"{name}.csv").read_text()
    assert len(rows) == len(ROLES) * 2 * 13 * 4


def test_published_numbers_stand_beside_ours(first, results):
    networks = (results/"published_networks.csv").read_text()
    for text in ("65.08±0.87/31.55±2.56,not run,76.28±0.26/12.57±1.02,not run,76.33±0.43/15.09±2.56,not run", "88.36±0.05/7.42±0.28", "79.77±0.39/9.01±1.01"):
        assert text in networks
    lines = networks.splitlines()
    assert len(lines) == 2 + 18 + 2 and sum("phantom-btcv" in line for line in lines) == 2
    summary = read_json(results/"summary.json")
    assert {row["method"] for row in summary["rows"]} == {*ROLES} and summary["preset"] == "smoke"


def test_nothing_of_this_machine_in_the_results(data, results):
    for path in (*results.glob("*.csv"), results/"results.md", results/"results.json", results/"summary.json"):
        assert not re.search(r"(^|[\s\"'=(])(/|[A-Za-z]:\\)\w+", path.read_text(), re.MULTILINE), path


# cell by cell, without data ------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("MEDKD_DATA", str(tmp_path/"data"))
    return tmp_path


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(epochs="many"), TypeError, "epochs='many'.*expected int or None"),
    (dict(epochs=-1), ValueError, "epochs=-1; expected"),
    (dict(teacher_weights="t.safetensors", teacher_epochs=5), ValueError, "contradict"),
    (dict(dataset="brats"), ValueError, "unknown dataset 'brats'; did you mean brats21"),
    (dict(teacher="resunet"), ValueError, "unknown teacher 'resunet'; did you mean resunet3d"),
    (dict(student="unet_tiny"), ValueError, "unknown student 'unet_tiny'; did you mean unet3d_tiny"),
    (dict(evaluation="mm"), ValueError, "unknown evaluation 'mm'"),
    (dict(patch="96"), ValueError, "patch='96'; expected 3 positive numbers"),
    (dict(methods="kd,acf"), KeyError, "unknown method 'acf'; did you mean acf_bckd"),
    (dict(methods="kd,kd"), ValueError, "names a method twice"),
    (dict(dataset="msd", task="Task04_Hipocampus"), KeyError, "unknown task 'Task04_Hipocampus'; did you mean Task04_Hippocampus"),
    (dict(task="Task04_Hippocampus"), ValueError, "task='Task04_Hippocampus' is for dataset=msd"),
    (dict(dataset="brats21", methods="nkd"), KeyError, "unknown method 'nkd'"),
    (dict(alpha=1), KeyError, "unknown parameter 'alpha'"),
])
def test_bad_parameter(here, parameters, kind, expected):
    cells = Cells(ACF, **parameters)
    with pytest.raises(kind, match=expected): cells.run_to("METHODS =")
    assert "source" not in cells.namespace and not list(here.rglob("params.json"))


@pytest.mark.parametrize("parameters, epochs, last", [
    (dict(dataset="btcv"), 1000, .001), (dict(dataset="btcv", teacher="segresnet"), 1000, .5005),
    (dict(dataset="btcv", teacher="segresnet", student="lcovnet"), 1000, .001), (dict(dataset="word"), 300, .5515), (dict(dataset="brats21"), 50, .51)])
def test_the_papers_schedules_and_weights(here, parameters, epochs, last):
    made = Cells(ACF, preset="paper", **parameters).run_to("METHODS =")
    weights = made["METHODS"]["acf_bckd"][1]
    assert made["chosen"]["epochs"] == epochs and made["chosen"]["seeds"] == 3 and made["patch"] == (96, 96, 96)
    assert weights["hbd"](0) == 1 and weights["sbd"](.99) == 0
    assert weights["hbd"](epochs - 1) == pytest.approx(last) and weights["sbd"](epochs - 1) == pytest.approx(1 - last)
    assert weights["afd"] == weights["cfd"] == 25000 and made["METHODS"]["at"][1]["at"] == 200
    assert tuple(made["wanted"]) == tuple(name for name in METHODS if parameters["dataset"] != "brats21" or name not in ("nkd", "dist"))
    for terms, given_weights, *_ in made["METHODS"].values():
        assert {name for term in terms for name in term().names} == {*given_weights}


@pytest.mark.parametrize("student", ["unet3d_tiny", "espnetv2_3d", "mobile_unet3d", "lcovnet"])
@pytest.mark.parametrize("dataset,preset", [("phantom", "smoke"), ("phantom", "quick"), ("msd", "quick"), ("msd", "paper"), ("btcv", "paper")])
def test_the_preset_fits_every_student(here, dataset, preset, student):
    made = Cells(ACF, dataset=dataset, preset=preset, student=student).run_to("METHODS =")
    with torch.device("meta"): build(student, 1, 14, made["chosen"]["student_width"]).check(torch.zeros(1, 1, *made["patch"]))
