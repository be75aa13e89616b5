"""papers/graph_flow.ipynb as a user meets it: a whole run on a small phantom, other students and data, wrong parameters."""

import numpy as np
import pandas as pd
import pytest
from notebooks import PAPERS, TWINS, Cells, alone, smoke_run

from medkd.files import read_json

NOTEBOOK = PAPERS/"graph_flow.ipynb"
NOTE = "phantom data, smoke preset"
METHODS = ("teacher", "student", "kd", "at", "fsp", "ft", "vid", "skd", "coco", "graph_flow")
DRAWN = {"training_samples", "examples", "curves_alone", "curves_paraphrasers", "curves_distilled", *(f"share_{name}" for name in METHODS[2:]),
         "salience", "scores", "overlays", "samples", "ablation", "few_labels", "cost"}


@pytest.fixture(scope="session")
def twins(shared):
    "A data root with small twins, made once for all processes of this test run."
    from medkd.data import phantom
    sections = [*(f"train_{k:04d}" for k in range(8)), *(f"test_{k:04d}" for k in range(2))]
    with alone(shared/"flow.lock"):
        phantom("gastric", shared/"flow", sections, (64, 64))
        phantom("acdc", shared/"flow", ["patient001", "patient003", "patient002", "patient004"], (3, 64, 64))
    return shared/"flow"


@pytest.fixture(scope="session")
def done(shared, twins):
    "The smoke run of one process of this test run."
    return smoke_run(shared, NOTEBOOK, data_root=twins)


@pytest.fixture
def results(done):
    assert done.code == 0, done.text[-3000:]
    return done.folder/"runs/graph_flow/phantom-gastric"


def kinds(cell): return [set(output.get("data", {})) for output in cell.outputs]


def test_every_cell_ran(done):
    assert done.code == 0, done.text[-3000:]
    assert [cell.execution_count for cell in done.cells] == list(range(1, len(done.cells) + 1))
    assert "Warning" not in "".join(output.text for cell in done.cells for output in cell.outputs if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook_and_in_its_folder(done, results):
    pictures = sum("image/png" in kind for cell in done.cells for kind in kinds(cell))
    assert {path.stem for path in (results/"figures").glob("*.png")} == DRAWN
    assert pictures == len(DRAWN) + 1 # the panel's
    panel, = (cell for cell in done.cells if "flow_panel(" in cell.source and "import" not in cell.source)
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds(panel))


def test_tables_say_what_they_are_of(done, results):
    tables = [output.data["text/html"] for cell in done.cells for output in cell.outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 10 and sum(NOTE in table for table in tables) == 9 # the published networks' cost is of no run
    assert (results/"results.md").read_text().count(NOTE) >= 9
    about = read_json(results/"results.json")
    assert list(about["runs"]) == list(METHODS) and about["data"]["phantom-gastric"]["phantom"]


def test_the_paper_stands_beside_a_phantom_without_a_difference(results):
    beside, cost = (pd.read_csv(results/name) for name in ("paper.csv", "paper_cost.csv"))
    assert len(beside) == 24 and set(beside["ours"]) == {"not run"} and beside["difference"].isna().all()
    for paper, ours in (("FLOPs (G), paper", "by thop's rules"), ("parameters (M), paper", "by thop's rules ")):
        np.testing.assert_allclose(cost[ours], cost[paper], rtol=2e-3)
    assert (cost["multiply-accumulates (G)"] < cost["by thop's rules"]).all()


def test_halves_ablations_and_stages_are_trained(results):
    roles = [path.name.rpartition("-")[0] for path in results.iterdir() if (path/"report.json").exists()]
    assert {name: roles.count(name) for name in set(roles)} == dict.fromkeys(METHODS, 1) | dict(
        paraphraser_encoder=2, paraphraser_decoder=2, paraphraser_e2=1, paraphraser_d3=1, graph_flow=2, graph_flow_2_pairs=1,
        few_teacher=1, few_student=1, few_graph_flow=2)


# cell by cell --------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(steps="many"), TypeError, "steps='many'.*expected int or None"),
    (dict(datset="acdc"), KeyError, "unknown parameter 'datset'; did you mean dataset"),
    (dict(dataset="gastrik"), ValueError, "unknown dataset 'gastrik'; did you mean gastric"),
    (dict(methods="kd,graphflow"), KeyError, "unknown method 'graphflow'; did you mean graph_flow"),
    (dict(methods="kd,kd"), ValueError, "names a method twice"),
    (dict(student="mobilenet"), KeyError, "unknown network 'mobilenet'; did you mean mobile_unet"),
    (dict(edges="dot"), ValueError, "unknown edges 'dot'"),
    (dict(patch=4), ValueError, "unknown patch 4"),
    (dict(size=48), ValueError, "unknown size 48"),
    (dict(labelled="half"), ValueError, "'half'; expected numbers"),
    (dict(layer_pairs=4), ValueError, "unknown layer_pairs 4"),
    (dict(teacher_weights="t.safetensors", teacher_steps=5), ValueError, "teacher_weights.*teacher_steps.*contradict"),
])
def test_bad_parameter(here, parameters, kind, expected):
    with pytest.raises(kind, match=expected): Cells(NOTEBOOK, **parameters).run_to("METHODS =")
    assert not list(here.iterdir())


def test_what_the_data_cannot_give_is_said_before_training(here, twins):
    for parameters, kind, expected in ((dict(labelled="8"), ValueError, "labelled=8 of 7 training patients"),
                                       (dict(dataset="phantom:acdc", crop=64), TypeError, "unknown option 'crop'")):
        with pytest.raises(kind, match=expected):
            Cells(NOTEBOOK, preset="smoke", data_root=str(twins), **parameters).run_to("halves =", skip=["samples ="])
    assert not list(here.rglob("params.json"))


TINY = dict(preset="smoke", methods="graph_flow", teacher_steps=1, steps=1, paraphraser_steps=1, layer_pairs=1, weight_rows=1, labelled="none")


@pytest.mark.parametrize("student, channels", [("enet", 16), ("erfnet", 16)])
def test_other_students(here, twins, student, channels):
    cells = Cells(NOTEBOOK, data_root=str(twins), student=student, **TINY)
    cells.run_to("for name in wanted: trained", skip=["samples =", "curves_alone"])
    held, run = cells.namespace["held"], cells.namespace["trained"]["graph_flow"]
    assert [one.network().factor for one in held] == [channels] * 2
    assert set(run.metrics("train")[0]["losses"]) == {"seg", "kd", "vertex", "edge", "adversarial"}


def test_volumes_of_several_classes(here, twins):
    cells = Cells(NOTEBOOK, data_root=str(twins), dataset="phantom:acdc", rules="published", **TINY)
    namespace = cells.run_to("scores computed again")
    assert {"overlays", "samples"} < {path.stem for path in (here/"runs/graph_flow/phantom-acdc/figures").glob("*.png")}
    assert [*namespace["per_class"]] == ["right ventricle", "myocardium", "left ventricle", "mean"]
    rows, test = namespace["rows"], namespace["source"].test
    assert {(row["method"], row["case"], row["metric"]) for row in rows} == {
        (method, case, metric) for method in ("teacher", "student", "graph_flow") for case in test.volumes for metric in ("dice", "iou", "hd95")}
    assert namespace["together"].to_numpy().min() >= 0 and namespace["together"].to_numpy().max() <= 1
    assert [*namespace["ruled"]] == ["teacher", "student", "graph_flow"]


def run_on(here, name, twin, last, **options):
    "What the cells up to the one that holds `last` leave behind on a small twin."
    from medkd.data import phantom
    phantom(name, here/"twins", *twin)
    cells = Cells(NOTEBOOK, data_root=str(here/"twins"), dataset=f"phantom:{name}", **TINY | options)
    namespace = cells.run_to(last, skip=["curves_alone", "curves_distilled", "share_{", 'figure("salience"', "flow_panel(layers"])
    assert {row["method"] for row in namespace["rows"]} == {"teacher", "student", *options["methods"].split(",")}
    return namespace


def test_organs_to_the_end(here):
    twin = ("case0005", "case0006", "case0007", "case0001", "case0002"), (5, 64, 64)
    namespace = run_on(here, "synapse", twin, "scores computed again", methods="kd,cirkd", patch=3)
    assert {row["metric"] for row in namespace["rows"]} == {"dice", "iou", "hd95", "hd95_pooled"}


def test_few_labels_of_vessels(here):
    namespace = run_on(here, "chasedb1", TWINS["chasedb1"], "if semi:", methods="cirkd,graph_flow", labelled="1")
    assert [*namespace["few_labelled"]] == [1, 2] and namespace["few_labelled"].loc["graph_flow + unlabelled"].notna().all()
    both = namespace["semi"]["graph_flow + unlabelled", 1]
    assert set(both.metrics("train")[0]["losses"]) == {"seg", "kd", "vertex", "edge", "adversarial"}
