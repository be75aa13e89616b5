"""papers/gkd.ipynb as a user meets it: a whole run on the phantoms, the same command again, and every wrong way to call it."""
import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from notebooks import Cells, Done, alone, cache, given, papermill, shared  # noqa: F401
from PIL import Image

from medkd.core import weights_sha256
from medkd.files import read_json, read_jsonl
from medkd.trainers.run import read_weights, save_weights

NOTE = "phantom data, smoke preset"
ROLES = ("teacher", "student", "kd", "at")
SETS = ("phantom-chasedb1", "phantom-stare", "phantom-drive")
RESULTS = ("scores.csv", "differences.csv", "cost.csv", "results.md", "results.json")
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} | dict(
    no_proxy="", NO_PROXY="")


# a whole run ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def first(shared):  # noqa: F811
    "The run of one process of this session, in one folder for all."
    folder, arguments = shared/"gkd", given(preset="smoke")
    with alone(shared/"gkd.lock"):
        if not (folder/"first.json").exists():
            folder.mkdir()
            done = papermill(folder, *arguments, MEDKD_CACHE=str(shared/"cache"))
            (folder/"first.json").write_text(json.dumps(dict(code=done.code, seconds=done.seconds, text=done.text)))
            shutil.copytree(folder/"runs", folder/"kept/runs")
            if done.code == 0: shutil.copy(folder/"out.ipynb", folder/"kept/out.ipynb")
    return Done(**json.loads((folder/"first.json").read_text()), folder=folder/"kept")


@pytest.fixture
def results(first):
    "The folder of the run's results."
    assert first.code == 0, first.text[-3000:]
    return first.folder/"runs/gkd/phantom-chasedb1"


def run_folder(results, role):
    found, = results.glob(f"{role}-????????")
    return found


def images(cell):
    "The pictures in a cell's output."
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def draws(source):
    return re.search(r"^\s*(for .*: )?(display\()?(figure\(|threshold_panel\()", source, re.MULTILINE)


def text_of(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def test_every_cell_ran(first):
    assert first.code == 0, first.text[-3000:]
    assert [cell.execution_count for cell in first.cells] == list(range(1, len(first.cells) + 1))
    assert not [output for cell in first.cells for output in cell.outputs if output.output_type == "error"]
    assert "Warning" not in "".join(output.text for cell in first.cells for output in cell.outputs
                                    if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook(first, results):
    drawing = [cell for cell in first.cells if draws(cell.source)]
    assert len(drawing) >= 8
    for cell in drawing: assert images(cell), cell.source
    pictures = [image for cell in first.cells for image in images(cell)]
    panels = sum("threshold_panel(" in cell.source for cell in drawing)
    assert len(pictures) - panels == len(list((results/"figures").glob("*.png")))
    for image in pictures: assert pixels(image).std() > 1


def pixels(image):
    from base64 import b64decode
    return np.asarray(Image.open(io.BytesIO(b64decode(image))).convert("L"), np.float32)


def test_panel_is_in_the_notebook(first):
    shown = [set(output.get("data", {})) for cell in first.cells for output in cell.outputs]
    assert any("application/vnd.jupyter.widget-view+json" in kinds for kinds in shown)


def test_every_table_and_figure_says_phantom_and_smoke(first, results):
    tables = [output.data["text/html"] for cell in first.cells for output in cell.outputs
              if "score_table(" in cell.source or "compare_table(" in cell.source or "cost_table(" in cell.source]
    assert len(tables) == 3 and all(NOTE in table for table in tables)
    assert (results/"results.md").read_text().count(NOTE) >= 4 and read_json(results/"results.json")["note"] == NOTE
    for call in drawing_calls(): assert "note" in {word.arg for word in call.keywords}, ast.unparse(call)


def drawing_calls():
    "Calls in the notebook that draw or make a table."
    text = "\n".join(source for source in Cells().sources if not source.startswith("%"))
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and re.fullmatch(r"show_\w+|\w+_table|threshold_panel", node.func.id)]


def test_results_say_what_they_are_made_of(results):
    assert all((results/name).stat().st_size for name in RESULTS)
    about = read_json(results/"results.json")
    assert {name: data["phantom"] for name, data in about["data"].items()} == dict.fromkeys(SETS, True)
    assert list(about["runs"]) == list(ROLES)
    for role, said in about["runs"].items():
        folder = run_folder(results, role)
        assert said["run"] == folder.name
        assert said["weights_sha256"] == weights_sha256(read_weights(folder/"best.safetensors"))
        assert said["report"] == read_json(folder/"report.json")
        assert about["data"]["phantom-chasedb1"]["sha256"] == read_json(folder/"env.json")["data"]["sha256"]


def test_reports_follow_from_the_logs(results):
    for role in ROLES:
        rows, report = (read(run_folder(results, role)/name) for read, name in
                        ((read_jsonl, "metrics.jsonl"), (read_json, "report.json")))
        scores = [row["scores"]["dice"] for row in rows if row["kind"] == "val"]
        assert report["best"] == max(scores) and report["steps"] == sum(row["kind"] == "train" for row in rows) == 4


def test_nothing_of_this_machine_in_the_results(results):
    for text in [(results/name).read_text() for name in RESULTS] + [(results/"figures").name]:
        assert not re.search(r"(^|[\s\"'=(])(/|[A-Za-z]:\\)\w+", text, re.MULTILINE)
        assert os.uname().nodename not in text
    for role in ROLES:
        env = read_json(run_folder(results, role)/"env.json")
        assert not [word for word in env["argv"] if "/" in word] and env["data"]["phantom"]
        assert {"torch", "monai", "python"} <= set(env["versions"]) and env["device"]


RECOMPUTE = """
import sys
from pathlib import Path
from medkd.data import load
from medkd.papers import stored_scores
from medkd.tables import compare_table, score_table
from medkd.trainers import Run
folder, note, *roles = sys.argv[1:]
tests = {splits.name: splits for splits in map(load, ("phantom:chasedb1", "phantom:stare", "phantom:drive"))}
rows = stored_scores({role: Run(next(Path(folder).glob(f"{role}-*"))) for role in roles}, tests)
score_table(rows, note=note).to_csv(sys.stdout)
print("---")
compare_table(rows, note=note).to_csv(sys.stdout)
"""


def test_scores_follow_from_the_stored_predictions(results, shared, tmp_path):  # noqa: F811
    copied = shutil.copytree(results, tmp_path/"results")
    for path in copied.rglob("*.safetensors"): path.unlink()
    before = {path.relative_to(results): path.read_bytes() for path in results.rglob("scores.csv")}
    done = subprocess.run([sys.executable, "-c", RECOMPUTE, str(copied), NOTE, *ROLES], capture_output=True, text=True,
                          env=os.environ | dict(MEDKD_CACHE=str(shared/"cache")), timeout=120)
    assert done.returncode == 0, done.stderr
    scores, differences = done.stdout.split("---\n")
    assert scores == (results/"scores.csv").read_text() and differences == (results/"differences.csv").read_text()
    assert {path.relative_to(copied): path.read_bytes() for path in copied.rglob("scores.csv")} == before
    assert len(before) == 1 + len(ROLES) * len(SETS)


def seconds(done):
    "What training, predicting and scoring took."
    return sum(cell.metadata.papermill.duration for cell in done.cells if "train(" in cell.source or "predict_all(" in cell.source)


def test_the_same_command_again_reuses_every_run(first, results, shared):  # noqa: F811
    again = papermill(shared/"gkd", *given(preset="smoke"), MEDKD_CACHE=str(shared/"cache"))
    assert again.code == 0 and seconds(again) < seconds(first) / 2
    assert any("step 4/4" in text_of(cell) for cell in first.cells)
    assert not any("step 4/4" in text_of(cell) for cell in again.cells)
    folder = again.folder/"runs/gkd/phantom-chasedb1"
    for name in ("scores.csv", "differences.csv"): assert (folder/name).read_bytes() == (results/name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in results.iterdir())
    for path in results.rglob("*"):
        if path.parent != results and path.is_file() and path.suffix != ".png":
            assert (folder/path.relative_to(results)).read_bytes() == path.read_bytes()


# bad input: the whole command ----------------------------------------------------------------------

def refused(done, *expected):
    "One error, at the end, with these words; the partial notebook is kept and no run was begun."
    assert done.code == 1
    for words in expected: assert re.search(words, done.error), done.error
    broken, = (cell for cell in done.cells if any(output.output_type == "error" for output in cell.outputs))
    after = done.cells[done.cells.index(broken) + 1:]
    assert after and not any(cell.outputs for cell in after)
    assert "During handling of the above exception" not in done.text
    assert not list(done.folder.rglob("params.json"))


def test_misspelt_parameter(tmp_path):
    refused(papermill(tmp_path, *given(datset="chasedb1")), "unknown parameter 'datset'", "did you mean dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def test_absent_data_without_a_network(tmp_path):
    (tmp_path/"data").mkdir()
    done = papermill(tmp_path, *given(dataset="chasedb1", preset="smoke"), MEDKD_DATA=str(tmp_path/"data"),
                     MEDKD_CACHE=str(tmp_path/"cache"), timeout=60, **NO_NETWORK)
    refused(done, "CHASEDB1", r"https://blogs\.kingston", "CC BY 4.0", "phantom:chasedb1")
    assert not (tmp_path/"runs").exists() and not list((tmp_path/"data").iterdir())


# bad input: cell by cell ---------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):  # noqa: F811
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(steps="many"), TypeError, "steps='many'.*expected int or None"),
    (dict(seed=1.5), TypeError, "seed=1.5.*expected int"),
    (dict(lr="1e-3x"), TypeError, "lr='1e-3x'.*expected float"),
    (dict(workers=True), TypeError, "workers=True.*expected int"),
    (dict(dataset=3), TypeError, "dataset=3.*expected str"),
    (dict(steps=-1), ValueError, "steps=-1; expected"),
    (dict(teacher_weights="t.safetensors", teacher_steps=5), ValueError, "teacher_weights.*teacher_steps.*contradict"),
    (dict(dataset="chasedb"), ValueError, "unknown dataset 'chasedb'; did you mean chasedb1"),
    (dict(dataset="__import__('os')"), ValueError, "unknown dataset"),
    (dict(preset="quik"), ValueError, "unknown preset 'quik'; did you mean quick"),
    (dict(precision="fp8"), ValueError, "unknown precision 'fp8'"),
    (dict(on_stale="ask"), ValueError, "unknown on_stale 'ask'"),
    (dict(student="mobilenet_unet"), KeyError, "unknown network 'mobilenet_unet'; did you mean mobile_unet"),
    (dict(teacher="fa_net"), KeyError, "unknown network 'fa_net'; did you mean fanet"),
    (dict(methods="kd,att"), KeyError, "unknown method 'att'; did you mean at"),
    (dict(methods="kd,kd"), ValueError, "names a method twice"),
])
def test_bad_parameter(here, parameters, kind, expected):
    cells = Cells(**parameters)
    with pytest.raises(kind, match=expected): cells.run_to("METHODS =")
    assert "source" not in cells.namespace and not list(here.iterdir())


def test_parameters_are_not_evaluated(here):
    cells = Cells(runs="'; import os; os.makedirs('evaluated'); '")
    cells.run_to("METHODS =")
    assert not list(here.iterdir())


def half_copied(root):
    "CHASEDB1 of which a third was copied."
    from medkd.data import phantom
    folder = phantom("chasedb1", root, size=(90, 96))
    (folder/"PHANTOM").unlink()
    for path in sorted(folder.iterdir())[28:]: path.unlink()
    return folder


def test_half_copied_data(here):
    half_copied(here/"data")
    with pytest.raises(FileNotFoundError, match=r"incomplete: \d+ of 56 files are missing.*verify chasedb1"):
        Cells(dataset="chasedb1", data_root=str(here/"data"), preset="smoke").run_to("source = load(")
    assert [path.name for path in here.iterdir()] == ["data"]


def test_file_in_place_of_the_runs(here):
    (here/"runs").write_text("mine")
    with pytest.raises(OSError, match="cannot make the folder runs/gkd"):
        Cells(preset="smoke").run_to('trained["teacher"] = train(')
    assert (here/"runs").read_text() == "mine"


def weights_of(name, path, **options):
    from medkd.models.zoo import build
    save_weights(path, build(name, 1, 2, **options))


def no_file(path): pass


def a_folder(path): path.mkdir()


def damaged(path):
    weights_of("fanet", path, width=.125)
    path.write_bytes(path.read_bytes()[:-100])


def another_network(path): weights_of("unet", path, width=.125)


def another_width(path): weights_of("fanet", path, width=.25)


def a_pickle(path):
    import torch
    torch.save(dict(a=1), path)


@pytest.mark.parametrize("make, expected", [
    (no_file, "t.safetensors"), (a_folder, "t.safetensors"), (damaged, "t.safetensors"),
    (another_network, "t.safetensors does not fit FANet"), (another_width, "does not fit FANet"), (a_pickle, "t.safetensors")])
def test_bad_teacher_weights(here, make, expected):
    make(here/"t.safetensors")
    cells = Cells(preset="smoke", teacher_weights="t.safetensors")
    with pytest.raises((OSError, ValueError), match=expected): cells.run_to('trained["teacher"] = train(', skip=["display("])
    assert not list(here.rglob("params.json")) and not list(here.rglob("*.adopting"))


def test_trained_teacher_is_taken(here):
    from medkd.__main__ import summary
    weights_of("fanet", here/"t.safetensors", width=.125)
    found = []
    for given_as in ("t.safetensors", "t.safetensors", None):
        given_as = given_as or str(found[0].path)
        cells = Cells(preset="smoke", teacher_weights=given_as, methods="kd", steps=1)
        found.append(cells.run_to('trained["teacher"] = train(', skip=["display("])["trained"]["teacher"])
    assert len({run.path for run in found}) == 1
    assert found[0].sha256 == weights_sha256(read_weights(here/"t.safetensors"))
    about = summary(found[0].path)
    assert (about["state"], about["steps"], found[0].report["adopted"]) == ("complete", 0, True)
    kd = cells.run_to("in wanted.items():", skip=["figure("])["trained"]["kd"]
    assert kd.params["decided"]["teacher"]["sha256"] == found[0].sha256


# real data -----------------------------------------------------------------------------------------

class Some:
    "A few items of a data set."
    def __init__(self, data, places):
        self.data, self.places = data, places
        self.cases, self.patients = ([names[i] for i in places] for names in (data.cases, data.patients))

    def __len__(self): return len(self.places)

    def __getitem__(self, i): return self.data[self.places[i]]


def fewer(splits):
    "One image to validate, two of different patients to test."
    val = Some(splits.val, [0]) if len(splits.val) else splits.val
    return replace(splits, val=val, test=Some(splits.test, [0, 2]), sha256=splits.sha256 + " fewer")


def test_whole_notebook_on_real_data(here):
    absent = [name for name in ("CHASEDB1", "STARE", "DRIVE") if not Path(os.environ.get("MEDKD_DATA", "nowhere"), name).is_dir()]
    if absent: pytest.skip(f"MEDKD_DATA holds no {', '.join(absent)}")
    cells = Cells(dataset="chasedb1", preset="smoke", steps=2, teacher_steps=2, methods="at")
    namespace = cells.run_to("source = load(")
    assert list(namespace["tests"]) == ["chasedb1", "stare", "drive"] and namespace["note"] == "smoke preset"
    namespace["tests"] = {name: fewer(splits) for name, splits in namespace["tests"].items()}
    namespace["source"] = namespace["tests"]["chasedb1"]
    cells.run_to("write_results(")
    folder, rows = here/"runs/gkd/chasedb1", namespace["rows"]
    drawn = {path.stem for path in (folder/"figures").glob("*.png")}
    assert drawn >= {"scores", "cost", "share_at", *(f"{kind}_{name}" for kind in ("first", "overlays") for name in namespace["tests"])}
    assert {(row["method"], row["dataset"]) for row in rows} == {
        (method, name) for method in ("teacher", "student", "at") for name in ("chasedb1", "stare", "drive")}
    assert all(0 <= row["value"] <= 1 for row in rows) and "phantom" not in (folder/"results.md").read_text()
