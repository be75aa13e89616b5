"""papers/compare.ipynb as a user meets it: a whole run on a small phantom, the same run once more, wrong parameters."""
import json

import pandas as pd
import pytest
from notebooks import PAPERS, Cells, smoke_run

from medkd.files import read_json

NOTEBOOK = PAPERS/"compare.ipynb"
NOTE = "phantom data, smoke preset"
TINY = dict(methods="kd,sikd", search=1)
DRAWN = {"training_samples", "curves", "forest", "ranks", "overlays", "cost", "published"}


@pytest.fixture(scope="session")
def done(shared, fundi):
    "The smoke run of one process of this test run."
    return smoke_run(shared, NOTEBOOK, data_root=fundi, **TINY)


@pytest.fixture
def results(done):
    assert done.code == 0, done.text[-3000:]
    return done.folder/"runs/compare/phantom-chasedb1/smoke"


def kinds(cell): return [set(output.get("data", {})) for output in cell.outputs]
def printed(cell): return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_every_cell_ran(done):
    assert done.code == 0, done.text[-3000:]
    assert [cell.execution_count for cell in done.cells] == list(range(1, len(done.cells) + 1))
    assert "Warning" not in "".join(output.text for cell in done.cells for output in cell.outputs if output.get("name") == "stderr")


def test_every_figure_is_in_the_notebook_and_in_its_folder(done, results):
    assert {path.stem for path in (results/"figures").glob("*.png")} == DRAWN
    assert sum("image/png" in kind for cell in done.cells for kind in kinds(cell)) == len(DRAWN) + 1 # the panel's
    panel, = (cell for cell in done.cells if "ForestPanel(rows" in cell.source)
    assert any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds(panel))


def test_the_plan_was_said_before_and_kept(done, results):
    text, = (printed(cell) for cell in done.cells if "print(f\"search:" in cell.source)
    assert "search: 3 trainings, 1 for each of 3 methods" in text and "estimated: " in text and "complete in" in text
    planned, made = (int(part.partition(" ")[0]) for part in (text.split("in all: ")[1], text.split("already: ")[1]))
    assert made == 0 and len([*results.glob("*/report.json")]) <= planned # of equal time may be of equal steps
    roles = {path.name.rpartition("-")[0] for path in results.iterdir() if (path/"report.json").exists()}
    assert roles == {"teacher", "student", "kd", "sikd", "sikd_oracle"}
    timing = read_json(results/"timing.json")
    assert roles == set(timing) and timing["student"]["slow"] == 1


def test_tables_are_written_three_times_and_say_what_they_are_of(results):
    names = {path.stem for path in (results/"tables").iterdir()}
    assert {f"{protocol}_{data}" for protocol in ("equal_iterations", "equal_training_time") for data in ("phantom-chasedb1", "phantom-stare", "phantom-drive")} < names
    for name in names:
        assert {path.suffix for path in (results/"tables").glob(f"{name}.*")} == {".csv", ".md", ".tex"}
        assert NOTE in (results/"tables"/f"{name}.md").read_text()
    table = pd.read_csv(results/"tables/equal_iterations_phantom-chasedb1.csv")
    assert table["method"].tolist() == ["teacher", "student", "kd", "sikd"] and set(table["seeds"]) == {1}
    assert (results/"results.md").read_text().count(NOTE) >= 9 and read_json(results/"results.json")["data"]["phantom-stare"]["phantom"]


def test_one_seed_has_no_winner(done, results):
    text, = (printed(cell) for cell in done.cells if "winner_text(winner" in cell.source)
    assert text.count("no winner") == 6 and text.count("1 seed (three are needed)") == 6
    assert "textbf" not in "".join(path.read_text() for path in (results/"tables").glob("equal_*.tex"))


def test_scores_lie_with_the_run_and_the_command_line_reads_them(done, results, capsys):
    from medkd.__main__ import main
    assert main(["table", str(results), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in rows} == {"teacher", *(f"{name}, seed 0, equal {budget}" for name in ("student", "kd", "sikd") for budget in ("iterations", "training time"))}
    table = pd.read_csv(results/"tables/equal_iterations_phantom-stare.csv").set_index("method")
    line, = (row for row in rows if (row["method"], row["dataset"]) == ("sikd, seed 0, equal iterations", "phantom-stare"))
    assert line["dice"].partition(" ")[0] == table["dice"]["sikd"].partition(" ")[0]


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def test_once_more_trains_predicts_and_scores_nothing(done, results, fundi, here, monkeypatch, capsys):
    import torch
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".pt", ".safetensors", ".csv") and path.parent.name != "tables"}
    cells = Cells(NOTEBOOK, data_root=str(fundi), runs=str(done.folder/"runs"), preset="smoke", **TINY)
    cells.run_to("plan = planned(")
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("a network was used"))
    cells.run_to("print(f\"search:")
    namespace = cells.run_to("of_teacher, of_equal, of_timed =")
    assert len(namespace["of_equal"][0]) == 3 * 9 * 3 and "phantom-drive" in namespace["tests"]
    assert f"complete in {(done.folder/'runs/compare/phantom-chasedb1/smoke')} already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("parameters, kind, expected", [
    (dict(budget="60m"), ValueError, "budget='60m'.*60s"),
    (dict(budget=2.5), TypeError, "budget=2.5.*expected int or str or None"),
    (dict(dataset="chasedb2"), ValueError, "unknown dataset 'chasedb2'; did you mean chasedb1"),
    (dict(methods="kd,gdk"), KeyError, "unknown method 'gdk'; did you mean"),
    (dict(methods="acf_bckd"), KeyError, "unknown method 'acf_bckd'"),
    (dict(student="unet3d_tiny"), KeyError, "unknown network 'unet3d_tiny'"),
    (dict(search="1,half"), ValueError, "'1,half'; expected numbers"),
    (dict(patch="32,32,32"), ValueError, "is for 3-D data, here it is 'phantom'"),
    (dict(task="Task04_Hippocampus"), ValueError, "is for 3-D data"),
])
def test_bad_parameter(here, parameters, kind, expected):
    with pytest.raises(kind, match=expected): Cells(NOTEBOOK, **parameters).run_to("DEFAULT =")
    assert not list(here.iterdir())
