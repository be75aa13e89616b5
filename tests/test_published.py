"""The published numbers as one tidy table: every line whole, once, and of a known kind."""
import csv
from pathlib import Path

import medkd
from medkd.published import COLUMNS

PATH = Path(medkd.__file__).parent/"published.csv"
ROWS = [*csv.DictReader(PATH.open(newline=""))]
PAPERS = {"acf_bckd", "graph_flow", "sikd", "hlfd"} # of GKD no number is public
UNITS = dict(dice={"%", "1"}, hd95={"voxels"}, accuracy={"1"}, miou={"1"}, operations={"G"}, parameters={"M"}) | {"dice gain": {"%"}}


def test_columns():
    assert tuple(ROWS[0]) == COLUMNS
    assert all(None not in row and None not in row.values() for row in ROWS)
    assert all(text == text.strip() for row in ROWS for text in row.values())


def test_every_line_has_a_number_a_place_and_a_source():
    for row in ROWS:
        assert 0 < float(row["value"]) < 1000, row
        assert row["sd"] == "" or 0 < float(row["sd"]) < float(row["value"]), row
        assert row["paper"] in PAPERS and row["table"] and ("github.com/" in row["source"] or "arXiv" in row["source"]), row
        assert row["unit"] in UNITS[row["metric"]], row
        if row["unit"] == "1": assert float(row["value"]) < 1, row
        if row["unit"] == "%": assert float(row["value"]) < 100, row


def test_no_line_twice():
    keys = [tuple(row[name] for name in COLUMNS if name not in ("value", "sd", "note")) for row in ROWS]
    assert len(set(keys)) == len(keys)


def test_names_are_those_of_the_kit():
    from medkd.data import DATASETS
    from medkd.models.zoo import MODELS
    for row in ROWS:
        assert all(row[name] == "" or row[name] in MODELS for name in ("teacher", "student")), row
        if row["paper"] != "sikd": assert row["dataset"] == "" or row["dataset"] in DATASETS, row
    methods = {row["method"] for row in ROWS}
    assert methods == {"teacher", "student", "kd", "at", "nkd", "skd", "ifvd", "cwd", "dist", "dkd", "cirkd", "acf_bckd", "graph_flow", "graph_flow + unlabelled",
                       "fsp", "ft", "vid", "sikd", "hlfd", "emkd"}


def test_teachers_and_students_stand_where_they_belong():
    for row in ROWS:
        if row["method"] == "teacher": assert row["teacher"] and not row["student"], row
        if row["method"] == "student" and row["paper"] != "sikd": assert row["student"] and not row["teacher"], row


def test_numbers_of_the_main_tables():
    def value(**where): return [float(row["value"]) for row in ROWS if all(row[name] == text for name, text in where.items())]
    main = dict(paper="graph_flow", table="main results", student="enet")
    assert value(**main, method="graph_flow", metric="miou") == [.7936] and value(**main, method="student", metric="operations") == [.516]
    assert value(paper="acf_bckd", method="cwd", dataset="word", teacher="segresnet") == [79.82]
    assert value(paper="acf_bckd", method="acf_bckd", dataset="brats21", teacher="resunet3d", student="lcovnet", metric="hd95") == [5.47]
    assert value(paper="sikd", dataset="polyps", metric="dice gain") == [1.36, 3.57]
    assert value(paper="graph_flow", method="graph_flow + unlabelled", setting="2 labelled cases") == [.4412]
