"""papers/gkd.ipynb as a user meets it: a whole run on small phantoms, the same command again, its options, and every wrong way to call it."""
import ast
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from notebooks import Cells, given, papermill, smoke_run
from PIL import Image

from medkd.core import weights_sha256
from medkd.data.base import data_root
from medkd.data.vessel_files import CHASEDB1, DRIVE, STARE
from medkd.data.vessels import load_vessels
from medkd.files import read_json, read_jsonl
from medkd.metrics import hd95
from medkd.trainers.run import Run, read_weights, save_weights

NOTE = "phantom data, smoke preset"
SCRATCH = ("teacher", "student", "kd", "at")
CONTINUED = ("gkd", "student continued", "student with views", "kd continued", "at continued")
ROLES = (*SCRATCH, *CONTINUED)
ALIGNED = ("latent", "psae", "msan_teacher", "msan_student")
SETS = ("phantom-chasedb1", "phantom-stare", "phantom-drive")
TABLES = ("scores", "differences", "cost", "fair", "views", "distances")
RESULTS = (*(f"{name}.csv" for name in TABLES), "results.md", "results.json")
FIGURES = {"training_samples", "views", "curves_alone", "curves_distilled", "share_kd", "share_at", "share_gkd", "attention",
           "scores", "tsne", "cost", *(f"{kind}_{name}" for kind in ("examples", "overlays", "samples") for name in SETS)}
DRAWING = ['figure("', 'figure(f"', "display("]
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")} | dict(
    no_proxy="", NO_PROXY="")


# a whole run ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def first(shared, fundi):
    "The run of one process of this test run, in one folder for all."
    return smoke_run(shared, data_root=fundi, dim=64)


@pytest.fixture
def results(first):
    "The folder of the run's results."
    assert first.code == 0, first.text[-3000:]
    return first.folder/"runs/gkd/phantom-chasedb1"


def run_folder(results, role):
    found, = results.glob(f"{role.replace(' ', '_')}-????????")
    return found


def output(cell, kind):
    "What a cell shows of one kind."
    return [shown.data[kind] for shown in cell.outputs if kind in shown.get("data", {})]


images = partial(output, kind="image/png")
tables = partial(output, kind="text/html")


def cell_with(done, text):
    found, = (cell for cell in done.cells if text in cell.source)
    return found


def draws(source):
    return "studied" not in source and re.search(r"^\s*(for .*: )?(display\()?(figure\(|threshold_panel\()", source, re.MULTILINE)


def test_every_cell_ran(first):
    assert first.code == 0, first.text[-3000:]
    assert [cell.execution_count for cell in first.cells] == list(range(1, len(first.cells) + 1))
    assert not [output for cell in first.cells for output in cell.outputs if output.output_type == "error"]
    assert "Warning" not in "".join(output.text for cell in first.cells for output in cell.outputs
                                    if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook(first, results):
    assert {path.stem for path in (results/"figures").glob("*.png")} == FIGURES
    drawing = [cell for cell in first.cells if draws(cell.source)]
    for cell in drawing: assert images(cell), cell.source
    pictures = [image for cell in first.cells for image in images(cell)]
    panels = sum("threshold_panel(" in cell.source for cell in drawing)
    assert len(pictures) - panels == len(FIGURES) and panels == 1
    for image in pictures: assert pixels(image).std() > 1


def pixels(image):
    from base64 import b64decode
    return np.asarray(Image.open(io.BytesIO(b64decode(image))).convert("L"), np.float32)


def test_panel_is_in_the_notebook(first):
    shown = [set(output.get("data", {})) for cell in first.cells for output in cell.outputs]
    assert any("application/vnd.jupyter.widget-view+json" in kinds for kinds in shown)


def test_every_table_and_figure_says_phantom_and_smoke(first, results):
    shown = [table for cell in first.cells for table in tables(cell)]
    assert len(shown) == len(TABLES) + 2 and all(NOTE in table for table in shown)
    assert (results/"results.md").read_text().count(NOTE) == 1 + len(TABLES)
    assert read_json(results/"results.json")["note"] == NOTE
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
        if role not in ("gkd", "student with views"):
            assert about["data"]["phantom-chasedb1"]["sha256"] == read_json(folder/"env.json")["data"]["sha256"]


def test_reports_follow_from_the_logs(results):
    for role in (*ROLES, *ALIGNED):
        rows, report = (read(run_folder(results, role)/name) for read, name in
                        ((read_jsonl, "metrics.jsonl"), (read_json, "report.json")))
        scores = [next(iter(row["scores"].values())) for row in rows if row["kind"] == "val"]
        assert report["best"] == max(scores) and report["steps"] == sum(row["kind"] == "train" for row in rows)
        assert report["steps"] == (4 if role in SCRATCH else 3)


def test_continued_students_are_trained_alike(results):
    decided = {role: read_json(run_folder(results, role)/"params.json")["decided"] for role in CONTINUED}
    alike = [{name: value for name, value in said.items() if name not in ("data", "teacher", "terms", "weights")} for said in decided.values()]
    assert all(said == alike[0] for said in alike) and (alike[0]["steps"], alike[0]["batch_size"]) == (3, 2)
    assert alike[0]["student"]["sha256"] == weights_sha256(read_weights(run_folder(results, "student")/"best.safetensors"))
    weights = [row["weights"] for row in read_jsonl(run_folder(results, "gkd")/"metrics.jsonl") if row["kind"] == "train"]
    assert weights == [dict(seg=1, intra=w, inter=w, cross=w) for w in (0, 1, 1)]


def test_nothing_of_this_machine_in_the_results(results):
    for text in [(results/name).read_text() for name in RESULTS] + [(results/"figures").name]:
        assert not re.search(r"(^|[\s\"'=(])(/|[A-Za-z]:\\)\w+", text, re.MULTILINE)
        assert os.uname().nodename not in text
    for role in (*ROLES, *ALIGNED):
        env = read_json(run_folder(results, role)/"env.json")
        assert not [word for word in env["argv"] if "/" in word] and env["data"]["phantom"]
        assert {"torch", "monai", "python"} <= set(env["versions"]) and env["device"]


# its numbers ---------------------------------------------------------------------------------------

RECOMPUTE = """
import sys
from pathlib import Path
from medkd.data import load
from medkd.papers import stored_scores
from medkd.tables import compare_table, score_table
from medkd.trainers import Run
folder, root, note, *roles = sys.argv[1:]
tests = {splits.name: splits for splits in (load(f"phantom:{name}", root, patch=64) for name in ("chasedb1", "stare", "drive"))}
rows = stored_scores({role: Run(next(Path(folder).glob(f"{role.replace(' ', '_')}-????????"))) for role in roles}, tests)
continued = [row for row in rows if row["method"] == "gkd" or " " in row["method"]]
for table in (score_table(rows, note=note), compare_table(rows, note=note), compare_table(continued, "student continued", note=note)):
    table.to_csv(sys.stdout)
    print("---")
"""


def test_scores_follow_from_the_stored_predictions(results, shared, fundi, tmp_path):
    copied = shutil.copytree(results, tmp_path/"results")
    for path in copied.rglob("*.safetensors"): path.unlink()
    before = {path.relative_to(results): path.read_bytes() for path in results.rglob("scores.csv")}
    done = subprocess.run([sys.executable, "-c", RECOMPUTE, str(copied), str(fundi), NOTE, *ROLES], capture_output=True, text=True,
                          env=os.environ | dict(MEDKD_CACHE=str(shared/"cache")), timeout=300)
    assert done.returncode == 0, done.stderr
    for name, text in zip(("scores", "differences", "fair"), done.stdout.split("---\n")):
        assert text == (results/f"{name}.csv").read_text()
    assert {path.relative_to(copied): path.read_bytes() for path in copied.rglob("scores.csv")} == before
    assert len(before) == 1 + len(ROLES) * len(SETS)


def stored(path):
    import pandas as pd
    return pd.read_csv(path, index_col=0)


def test_rows_stand_by_data_set_in_the_order_of_training(results):
    assert [*stored(results/"scores.csv")[["dataset", "method"]].itertuples(index=False, name=None)] == [
        (name, role) for name in SETS for role in ROLES]
    for table, baseline, roles in (("differences", "student", ROLES), ("fair", "student continued", CONTINUED)):
        assert [*stored(results/f"{table}.csv")[["dataset", "method"]].itertuples(index=False, name=None)] == [
            (name, role) for name in SETS for role in roles if role != baseline]


def test_shown_tables_are_the_stored_ones(first, results):
    shown = [table for cell in first.cells for table in tables(cell)]
    for name in TABLES: assert stored(results/f"{name}.csv").rename_axis(columns=NOTE)._repr_html_() in shown, name


def test_alignment_and_wiring_follow_from_the_logs(first, results):
    import pandas as pd
    best = lambda role: max((row["scores"] for row in read_jsonl(run_folder(results, role)/"metrics.jsonl") if row["kind"] == "val"),
                            key=lambda scores: scores["dice"])
    table = pd.DataFrame({"teacher: D(G(E(f)))": best("msan_teacher"), "student: D(G(E(f)))": best("msan_student"),
                          "annotations: LatentNet": best("latent"), "annotations: P-SAE": best("psae")}).T
    assert tables(cell_with(first, "best_scores(")) == [table.rename_axis(columns=NOTE)._repr_html_()]
    wiring = {role: read_json(run_folder(results, role)/"wiring.json") for role in ("kd", "at", "gkd")}
    parts = [(method, term, row["value"], row["gradient"]) for method, report in wiring.items() for term, row in report.items() if term != "unreached"]
    table = pd.DataFrame(parts, columns=["method", "term", "value", "gradient"]).assign(weight=[1, 1, 1, 1000, 1, 1, 1, 1])
    assert [part[1] for part in parts] == ["seg", "kd", "seg", "at", "seg", "intra", "inter", "cross"]
    assert tables(cell_with(first, "wiring.json")) == [table.rename_axis(columns=NOTE)._repr_html_()]


def test_cost_is_of_the_networks_that_were_trained(results):
    counts = {role: sum(p.numel() for p in Run(run_folder(results, role)).network().parameters()) / 1e6 for role in ("teacher", "student")}
    cost = stored(results/"cost.csv").set_index("network")
    assert cost["parameters (M)"].to_dict() == pytest.approx(counts) and set(cost["input"]) == {"1×1×64×64"}


# the same command again, and its options -----------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def take(results, *roles):
    "Copies of these runs where the same command looks for them."
    for role in roles: shutil.copytree(run_folder(results, role), Path("runs/gkd/phantom-chasedb1")/run_folder(results, role).name)
    return Path("runs/gkd/phantom-chasedb1")


def roles_in(folder):
    return sorted(path.name.rpartition("-")[0] for path in folder.iterdir() if (path/"params.json").exists())


TRAINED = re.compile(r"starting, \d+ steps|step \d+/\d+")


def test_the_same_command_again_reuses_every_run(here, results, fundi, capsys):
    folder = take(results, *ROLES, *ALIGNED)
    Cells(preset="smoke", dim=64, data_root=str(fundi)).run_to("write_results(", skip=["show_results("])
    assert not TRAINED.search(capsys.readouterr().out) and roles_in(folder) == roles_in(results)
    for path in results.rglob("*"):
        if path.is_file() and path.suffix != ".png" and path.name not in ("cost.csv", "results.md"):
            assert (folder/path.relative_to(results)).read_bytes() == path.read_bytes(), path


def test_ablation_and_sensitivity(here, results, fundi, capsys):
    folder = take(results, *ROLES, *ALIGNED)
    cells = Cells(preset="smoke", dim=64, data_root=str(fundi), ablation=True, sensitivity=True)
    source = cells.run_to("source = load(", skip=DRAWING)["source"]
    cells.namespace["tests"] = {source.name: source}
    namespace = cells.run_to("study_rows =", skip=DRAWING)
    weights = {label: dict(zip(("intra", "inter", "cross"), values)) for label, values in {
        "Intra": (1, 0, 0), "Inter": (0, 1, 0), "Cross": (0, 0, 1), "Intra + Inter": (1, 1, 0), "Intra + Inter + Cross": (1, 1, 1),
        "intra x 0.1": (.1, 1, 1), "intra x 10": (10, 1, 1), "inter x 0.1": (1, .1, 1), "inter x 10": (1, 10, 1),
        "cross x 0.1": (1, 1, .1), "cross x 10": (1, 1, 10)}.items()}
    assert list(namespace["studied"]) == list(weights)
    for label, run in namespace["studied"].items():
        *_, last = run.metrics("train")
        assert last["weights"] == dict(seg=1) | weights[label], label
        assert set(last["losses"]) == {"seg", *(name for name, weight in weights[label].items() if weight)}, label
    assert namespace["studied"]["Intra + Inter + Cross"].path == namespace["trained"]["gkd"].path
    assert roles_in(folder).count("gkd") == 11
    assert {(row["method"], row["dataset"]) for row in namespace["study_rows"]} == {
        (label, source.name) for label in (*weights, "student continued", "gkd")}
    out = capsys.readouterr().out
    assert len(re.findall("starting, 3 steps", out)) == 10 == len(TRAINED.findall(out)) - 10
    assert NOTE in out and re.search(r"4 more students, about \d+ min here \(on\).* 6, about \d+ min \(on\)", out)
    assert (folder/"figures/ablation.png").exists()


def test_without_gkd(here, results, fundi, capsys):
    folder = take(results, "teacher", "student", "kd")
    namespace = Cells(preset="smoke", dim=64, data_root=str(fundi), methods="kd").run_to("write_results(")
    assert not TRAINED.search(capsys.readouterr().out) and roles_in(folder) == ["kd", "student", "teacher"]
    assert list(namespace["trained"]) == list(read_json(folder/"results.json")["runs"]) == ["teacher", "student", "kd"]
    assert {path.name for path in folder.glob("*.csv")} == {"scores.csv", "differences.csv", "cost.csv"}
    assert {path.stem for path in (folder/"figures").glob("*.png")} == FIGURES - {"tsne", "share_at", "share_gkd"}
    of_kd = lambda table: table[table["method"].isin(["teacher", "kd"])].drop(columns="p_holm").reset_index(drop=True)
    assert of_kd(stored(folder/"differences.csv")).equals(of_kd(stored(results/"differences.csv")))


def test_other_methods_are_rows(here, fundi):
    methods = "nkd,skd,ifvd,cwd,dist,dkd,cirkd,fsp,coco"
    cells = Cells(preset="smoke", dim=64, data_root=str(fundi), methods=methods, teacher_steps=1, steps=1, alignment_steps=1)
    cells.run_to("source = load(")
    trained = cells.run_to("for name in taught: trained", skip=DRAWING)["trained"]
    assert list(trained) == ["teacher", "student", *methods.split(",")]
    roles = roles_in(here/"runs/gkd/phantom-chasedb1")
    assert {"paraphraser_encoder", "paraphraser_decoder"} < set(roles) and len(roles) == 13
    assert (trained["coco"].path/"wiring.json").exists()


def test_liver_is_scored_per_patient_in_mm(here, livers):
    cells = Cells(dataset="phantom:chaos", preset="smoke", methods="gkd", data_root=str(livers), teacher_steps=1, steps=1,
                  alignment_steps=1, more_steps=2, dim=16)
    namespace = cells.run_to("write_results(")
    folder, rows, sets = here/"runs/gkd/phantom-chaos", namespace["rows"], namespace["tests"]
    methods = ("teacher", "student", "gkd", "student continued", "student with views")
    assert list(namespace["trained"]) == list(methods) and list(sets) == ["phantom-chaos", "phantom-lits"]
    patients = {name: [*splits.test.volumes] for name, splits in sets.items()}
    assert {name: len(found) for name, found in patients.items()} == {"phantom-chaos": 2, "phantom-lits": 2}
    assert [(row["dataset"], row["method"], row["case"]) for row in rows if row["metric"] == "dice"] == [
        (name, method, patient) for name in sets for method in methods for patient in patients[name]]
    for name, method in (("phantom-chaos", "gkd"), ("phantom-lits", "teacher")):
        kept = namespace["trained"][method].path/"predictions"/name
        assert set(stored_column(kept/"scores.csv", "unit")) == {"mm"}
        for patient in patients[name]:
            said = {row["metric"]: row["value"] for row in rows if (row["dataset"], row["method"], row["case"]) == (name, method, patient)}
            expected = by_hand(kept, sets[name].test, patient)
            assert {metric: said[metric] for metric in expected} == pytest.approx(expected) and np.isfinite(said["hd95"])
    assert {"fair.csv", "views.csv", "distances.csv"} <= {path.name for path in folder.glob("*.csv")}
    assert {path.stem for path in (folder/"figures").glob("*.png")} >= {"tsne", *(f"{kind}_{name}" for kind in ("overlays", "samples") for name in sets)}


def stored_column(path, name):
    import pandas as pd
    return pd.read_csv(path)[name]


def by_hand(folder, test, patient):
    "Scores of a patient's stored slices, laid on the scanner's grid."
    whole = test.native(patient)
    pred, truth = np.stack([laid_on(folder/f"{case}.png", whole["label"].shape[1:]) for case in whole["cases"]]), whole["label"] == 1
    return dict(dice=2 * (pred & truth).sum() / (pred.sum() + truth.sum()), hd95=hd95(pred, truth, whole["spacing"]))


def laid_on(path, shape):
    "Whether a stored probability, resized to (H,W), reaches one half."
    with Image.open(path) as image: probability = (np.asarray(image) + np.float32(.5)) / 256
    return np.asarray(Image.fromarray(probability).resize(shape[::-1], Image.Resampling.BILINEAR)) >= .5


# bad input: the whole command ----------------------------------------------------------------------

def test_misspelt_parameter(tmp_path):
    done = papermill(tmp_path, *given(datset="chasedb1"))
    assert done.code == 1 and re.search("unknown parameter 'datset'.*did you mean dataset", done.error), done.error
    broken, = (cell for cell in done.cells if any(output.output_type == "error" for output in cell.outputs))
    after = done.cells[done.cells.index(broken) + 1:]
    assert after and not any(cell.outputs for cell in after)
    assert "During handling of the above exception" not in done.text
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


# bad input: cell by cell ---------------------------------------------------------------------------

def made(folder):
    "What a notebook that was stopped left behind, the empty folder of the runs apart."
    return [path.name for path in folder.rglob("*") if path != folder/"runs"]


def test_absent_data_without_a_network(here, monkeypatch):
    (here/"data").mkdir()
    for name, value in dict(NO_NETWORK, MEDKD_DATA=str(here/"data")).items(): monkeypatch.setenv(name, value)
    with pytest.raises(FileNotFoundError) as error: Cells(dataset="chasedb1", preset="smoke").run_to("source = load(")
    for words in ("CHASEDB1", "https://blogs.kingston", "CC BY 4.0", "phantom:chasedb1"): assert words in str(error.value)
    assert error.value.__context__ is None and made(here) == ["data"]


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(steps="many"), TypeError, "steps='many'.*expected int or None"),
    (dict(seed=1.5), TypeError, "seed=1.5.*expected int"),
    (dict(lr="1e-3x"), TypeError, "lr='1e-3x'.*expected float"),
    (dict(workers=True), TypeError, "workers=True.*expected int"),
    (dict(dataset=3), TypeError, "dataset=3.*expected str"),
    (dict(size=100), ValueError, "unknown size 100"),
    (dict(dim=25.6), TypeError, "dim=25.6.*expected int"),
    (dict(anchors="two"), TypeError, "anchors='two'.*expected int or None"),
    (dict(alignment_width="narrow"), TypeError, "alignment_width='narrow'.*expected float or None"),
    (dict(ablation=1), TypeError, "ablation=1.*expected bool"),
    (dict(sensitivity="yes"), TypeError, "sensitivity='yes'.*expected bool"),
    (dict(steps=-1), ValueError, "steps=-1; expected"),
    (dict(more_steps=-1), ValueError, "more_steps=-1; expected"),
    (dict(alignment_lr=-.1), ValueError, "alignment_lr=-0.1; expected"),
    (dict(teacher_weights="t.safetensors", teacher_steps=5), ValueError, "teacher_weights.*teacher_steps.*contradict"),
    (dict(dataset="chasedb"), ValueError, "unknown dataset 'chasedb'; did you mean chasedb1"),
    (dict(dataset="phantom:stare"), ValueError, "unknown dataset 'phantom:stare'"),
    (dict(dataset="__import__('os')"), ValueError, "unknown dataset"),
    (dict(preset="quik"), ValueError, "unknown preset 'quik'; did you mean quick"),
    (dict(precision="fp8"), ValueError, "unknown precision 'fp8'"),
    (dict(on_stale="ask"), ValueError, "unknown on_stale 'ask'"),
    (dict(student="mobilenet_unet"), KeyError, "unknown network 'mobilenet_unet'; did you mean mobile_unet"),
    (dict(teacher="fa_net"), KeyError, "unknown network 'fa_net'; did you mean fanet"),
    (dict(methods="kd,att"), KeyError, "unknown method 'att'; did you mean at"),
    (dict(methods="kd,gkd,kd"), ValueError, "names a method twice"),
])
def test_bad_parameter(here, parameters, kind, expected):
    cells = Cells(**parameters)
    with pytest.raises(kind, match=expected): cells.run_to("METHODS =")
    assert "source" not in cells.namespace and not made(here)


def test_parameters_are_not_evaluated(here):
    Cells(runs="'; import os; os.makedirs('evaluated'); '").run_to("METHODS =")
    assert made(here) == ["'; import os; os.makedirs('evaluated'); '"]


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
    assert {path.name for path in here.iterdir()} == {"data", "runs"} and not list((here/"runs").iterdir())


SECOND = "make_folder(runs)" # the second cell of code after the parameters: nothing is loaded or drawn before


def test_file_in_place_of_the_runs(here):
    (here/"runs").write_text("mine")
    for runs in ("runs", "runs/deeper"):
        with pytest.raises(OSError, match=f"cannot make the folder {runs}"): Cells(preset="smoke", runs=runs).run_to(SECOND)
    assert (here/"runs").read_text() == "mine" and not made(here)


def weights_of(name, path, **options):
    from medkd.models.zoo import build
    save_weights(path, build(name, 1, 2, **options))


def no_file(path): pass


def a_folder(path): path.mkdir()


def damaged(path):
    weights_of("unet", path, width=.125)
    path.write_bytes(path.read_bytes()[:-100])


def another_network(path): weights_of("fanet", path, width=.125)


def another_width(path): weights_of("unet", path, width=.25)


def a_pickle(path):
    import torch
    torch.save(dict(a=1), path)


@pytest.mark.parametrize("make, expected", [
    (no_file, "t.safetensors"), (a_folder, "t.safetensors"), (damaged, "t.safetensors"),
    (another_network, "t.safetensors does not fit UNet"), (another_width, "does not fit UNet"), (a_pickle, "t.safetensors")])
def test_bad_teacher_weights(here, make, expected):
    make(here/"t.safetensors")
    with pytest.raises((OSError, ValueError), match=expected): Cells(preset="smoke", teacher_weights="t.safetensors").run_to(SECOND)
    assert set(made(here)) <= {"t.safetensors"}


def test_problems_are_answered_before_data_and_figures():
    code = [source for source in Cells().sources if not source.startswith("%")]
    second, = (i for i, source in enumerate(code) if SECOND in source)
    assert "load_network(" in code[second]
    assert not any("load(" in source.replace("load_network(", "") or draws(source) for source in code[:second + 1])


def test_trained_teacher_is_taken(here, fundi):
    from medkd.manage import summary
    weights_of("unet", here/"t.safetensors", width=.125)
    found = []
    for given_as in ("t.safetensors", "t.safetensors", None):
        given_as = given_as or str(found[0].path)
        cells = Cells(preset="smoke", dim=64, data_root=str(fundi), teacher_weights=given_as, methods="kd", steps=1)
        cells.run_to("source = load(", skip=DRAWING)
        found.append(cells.run_to('trained["teacher"] = train(', skip=DRAWING)["trained"]["teacher"])
    assert len({run.path for run in found}) == 1
    assert found[0].sha256 == weights_sha256(read_weights(here/"t.safetensors"))
    about = summary(found[0].path)
    assert (about["state"], about["steps"], found[0].report["adopted"]) == ("complete", 0, True)
    kd = cells.run_to("for name in taught: trained", skip=DRAWING)["trained"]["kd"]
    assert kd.params["decided"]["teacher"]["sha256"] == found[0].sha256


# real data -----------------------------------------------------------------------------------------

FEW = {"chasedb1": (CHASEDB1, dict(train=("Image_01L", "Image_02L"), val=("Image_10L",), test=("Image_11L", "Image_12L"))),
       "stare": (STARE, dict(train=(), val=(), test=STARE.test[:1])), "drive": (DRIVE, dict(train=(), val=(), test=DRIVE.test[:1]))}


def test_whole_notebook_on_real_data(here, monkeypatch):
    from medkd.data import DATASETS
    absent = [DATASETS[name].folder for name in FEW if not (data_root()/DATASETS[name].folder).is_dir()]
    if absent: pytest.skip(f"MEDKD_DATA holds no {', '.join(absent)}")
    for name, (vessels, parts) in FEW.items():
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], loader=partial(load_vessels, replace(vessels, **parts))))
    cells = Cells(dataset="chasedb1", preset="smoke", size=128, steps=2, teacher_steps=2, methods="at")
    namespace = cells.run_to("write_results(")
    folder, rows = here/"runs/gkd/chasedb1", namespace["rows"]
    assert list(namespace["tests"]) == list(FEW) and namespace["note"] == "smoke preset"
    drawn = {path.stem for path in (folder/"figures").glob("*.png")}
    assert drawn >= {"scores", "cost", "share_at", *(f"{kind}_{name}" for kind in ("examples", "overlays", "samples") for name in FEW)}
    assert {(row["method"], row["dataset"]) for row in rows} == {(method, name) for method in ("teacher", "student", "at") for name in FEW}
    assert all(0 <= row["value"] <= 1 for row in rows) and "phantom" not in (folder/"results.md").read_text()
