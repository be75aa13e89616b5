"""`python -m medkd` as a person or a script calls it: exit codes, JSON, and errors in one line."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy

from medkd.data import phantom
from medkd.trainers import fit

ROOT = Path(__file__).parent.parent


def medkd(*arguments, **options):
    "Run a command; what it printed on both channels may hold no traceback."
    done = subprocess.run([sys.executable, "-m", "medkd", *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def refused(done, *expected):
    "Exit code 2, nothing on standard output, one line on standard error."
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    for words in expected: assert re.search(words, done.stderr), done.stderr


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    "A small twin of STARE, and a spoilt copy of it."
    root = tmp_path_factory.mktemp("twins")
    for name in ("good", "bad"): phantom("stare", root/name, ["im0001", "im0002"], (90, 96))
    folder = root/"bad/STARE"
    photograph, other = sorted(folder.rglob("im000*.ppm*"))[:2]
    photograph.write_bytes(photograph.read_bytes()[:100])
    other.unlink()
    return dict(good=root/"good", bad=root/"bad", damaged=photograph.name, missing=other.name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A complete run, one set aside, and one that was begun."
    root = tmp_path_factory.mktemp("work")
    done = fit(replace(toy.alone, steps=2, epochs=None), root/"runs/toy/squares/student").path
    for name, without in (("begun-00000000", ["report.json"]), (done.name + ".stale-1", [])):
        copied = done.with_name(name)
        copied.mkdir()
        for path in done.iterdir():
            if path.name not in without: (copied/path.name).write_bytes(path.read_bytes())
    return root, done


def test_help():
    done = medkd("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("verify", "runs", "check every file"))
    for command, words in dict(verify=["chasedb1", "phantom:NAME", "MEDKD_DATA", "--json"], runs=["--show", "--root", "--json"]).items():
        done = medkd(command, "--help")
        assert done.returncode == 0 and all(word in done.stdout for word in words)


@pytest.mark.parametrize("arguments", [[], ["verfy"], ["verify"], ["runs", "--sho", "x", "y"]])
def test_wrong_call_shows_the_usage(arguments):
    done = medkd(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_console_script():
    "The installed command calls the same function."
    target, = re.findall(r"medkd=([\w.]+:\w+)", (ROOT/"setup.py").read_text())
    module, name = target.split(":")
    code = f"import sys; from {module} import {name}; sys.argv[0] = 'medkd'; sys.exit({name}())"
    done = subprocess.run([sys.executable, "-c", code, "runs", "--root", "nowhere"], capture_output=True, text=True, cwd=ROOT)
    refused(done, "no folder nowhere")
    script = Path(sys.executable).with_name("medkd")
    if script.exists():
        assert "verify" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout


# verify --------------------------------------------------------------------------------------------

def test_verify_finds_nothing(twins):
    done = medkd("verify", "phantom:stare", "--root", twins["good"])
    assert done.returncode == 0 and "no problem" in done.stdout and done.stderr == ""
    assert json.loads(medkd("verify", "phantom:stare", "--root", twins["good"], "--json").stdout) == []


def test_verify_names_bad_files(twins):
    done = medkd("verify", "phantom:stare", "--root", twins["bad"])
    assert done.returncode == 1
    assert re.search(rf"damaged +\S*{twins['damaged']}: .", done.stdout) and re.search(rf"missing +\S*{twins['missing']}: .", done.stdout)
    found = json.loads(medkd("verify", "phantom:stare", "--root", twins["bad"], "--json").stdout)
    assert {Path(problem["file"]).name: problem["kind"] for problem in found} == {
        twins["damaged"]: "damaged", twins["missing"]: "missing"}
    assert all(set(problem) == {"file", "kind", "message"} for problem in found)


def test_verify_refuses(twins, tmp_path):
    refused(medkd("verify", "chasedb"), "unknown data set 'chasedb'; did you mean chasedb1", "phantom:chasedb1")
    refused(medkd("verify", "phantom:star"), "did you mean.*phantom:stare")
    refused(medkd("verify", "stare", "--root", twins["good"]), "holds a phantom twin, not STARE")
    refused(medkd("verify", "drive", env=os.environ | dict(MEDKD_DATA=str(tmp_path))),
            str(tmp_path/"DRIVE"), r"drive\.grand-challenge\.org", "phantom:drive")
    assert not list(tmp_path.iterdir())


# runs ----------------------------------------------------------------------------------------------

def test_runs_are_listed(runs):
    root, done = runs
    listed = medkd("runs", cwd=root)
    assert listed.returncode == 0
    heading, *lines = listed.stdout.splitlines()
    assert heading.split() == ["run", "state", "data", "steps", "best", "seconds"] and len(lines) == 2
    rows = {Path(row["run"]).name: row for row in json.loads(medkd("runs", "--root", root, "--json").stdout)}
    assert set(rows) == {"begun-00000000", done.name}
    assert rows[done.name]["state"] == "complete" and rows["begun-00000000"]["state"] == "unfinished"
    assert (rows[done.name]["data"], rows[done.name]["steps"]) == ("squares", 2)
    assert rows[done.name]["best"] == json.loads((done/"report.json").read_text())["best"]


def test_run_is_shown(runs):
    _, done = runs
    shown = json.loads(medkd("runs", "--show", done).stdout)
    assert shown["state"] == "complete" and shown["last"]["step"] == 1 and set(shown["last"]["losses"]) == {"seg"}
    assert {"best.safetensors", "params.json", "env.json", "metrics.jsonl"} <= set(shown["files"])
    assert shown["recipe"]["lr"] == .01 and "torch" in shown["env"]["versions"]


def test_nothing_to_list(tmp_path):
    done = medkd("runs", "--root", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"no runs under {tmp_path}\n")
    assert json.loads(medkd("runs", "--root", tmp_path, "--json").stdout) == []


def test_runs_refuses(tmp_path):
    refused(medkd("runs", cwd=tmp_path), "no folder runs; runs are written to ./runs, or give --root")
    refused(medkd("runs", "--show", tmp_path), f"no run at {tmp_path}")


def test_damaged_run_is_named_and_hides_no_other(runs, tmp_path):
    _, done = runs
    for name, text in (("cut", '{"hash": "0'), ("other", '{"a": 1}'), ("list", "[]")):
        (tmp_path/name).mkdir()
        (tmp_path/name/"params.json").write_text(text)
    copied = tmp_path/"good"
    copied.mkdir()
    for path in done.iterdir(): (copied/path.name).write_bytes(path.read_bytes())
    listed = medkd("runs", "--root", tmp_path, "--json")
    states = {Path(row["run"]).name: row["state"] for row in json.loads(listed.stdout)}
    assert listed.returncode == 0 and states["good"] == "complete"
    assert all(states[name].startswith("damaged: ") for name in ("cut", "other", "list"))
    assert len(medkd("runs", "--root", tmp_path).stdout.splitlines()) == 5
    refused(medkd("runs", "--show", tmp_path/"cut"), "cut/params.json is damaged")
    refused(medkd("runs", "--show", tmp_path/"other"), "other/params.json is not that of a run")
    (copied/"metrics.jsonl").write_text("{\n" + (copied/"metrics.jsonl").read_text())
    refused(medkd("runs", "--show", copied), "metrics.jsonl is damaged in line 1")


def test_actions_have_help():
    done = medkd("runs", "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("list", "show", "compare", "prune", "--root"))
    done = medkd("runs", "prune", "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("--unfinished", "--stale", "--older-than DAYS", "--dry-run", "--yes", "--json"))


def test_two_runs_side_by_side(runs, tmp_path):
    _, done = runs
    other = fit(replace(toy.alone, steps=2, epochs=None, lr=.02), tmp_path/"student").path
    found = json.loads(medkd("runs", "compare", done, other, "--json").stdout)
    assert found["differs"] == {"lr": [.01, .02]} and found["scores"]["state"] == ["complete", "complete"]
    lines = medkd("runs", "compare", done, other).stdout.splitlines()
    assert ["lr", "0.01", "0.02"] in [line.split() for line in lines]
    refused(medkd("runs", "compare", done, tmp_path), f"no run at {tmp_path}")


# in this process: what is deleted, and what is not --------------------------------------------------

@pytest.fixture
def called(capsys):
    from medkd.__main__ import main
    def call(*arguments):
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err
    return call


@pytest.fixture
def copies(runs, tmp_path):
    "A folder with a complete run, one set aside and one that was begun."
    import shutil
    root, done = runs
    shutil.copytree(root/"runs", tmp_path/"runs")
    return tmp_path/"runs", {path.name: path for path in (tmp_path/"runs/toy/squares").iterdir()}


def test_prune_takes_what_is_unfinished_or_stale(called, copies):
    root, folders = copies
    begun, = (path for name, path in folders.items() if name.startswith("begun"))
    aside, = (path for name, path in folders.items() if ".stale-" in name)
    done, = (path for path in folders.values() if path not in (begun, aside))
    code, out, _ = called("runs", "prune", "--unfinished", "--stale", "--dry-run", "--root", root)
    assert code == 0 and "nothing was deleted" in out and all(path.exists() for path in folders.values())
    code, out, error = called("runs", "prune", "--unfinished", "--root", root) # nobody at the keyboard
    assert code == 2 and "--yes deletes without asking" in error and begun.exists()
    assert called("runs", "prune", "--older-than", "1", "--yes", "--root", root)[:2] == (0, "nothing to delete\n")
    code, out, _ = called("runs", "prune", "--older-than", "0", "--yes", "--json", "--root", root)
    assert code == 0 and {row["why"] for row in json.loads(out)["found"]} == {"unfinished", "stale"}
    assert not begun.exists() and not aside.exists() and (done/"report.json").exists() and [*done.parent.iterdir()] == [done]


def test_a_complete_run_goes_only_by_its_name(called, copies):
    root, folders = copies
    done = min(folders.values(), key=lambda path: (".stale-" in path.name, path.name.startswith("begun")))
    assert called("runs", "prune", "--root", root)[0] == 2 and "complete runs only by name" in called("runs", "prune", "--root", root)[2]
    assert called("runs", "prune", done, "--yes")[0] == 0 and not done.exists() and len([*done.parent.iterdir()]) == 2
    assert called("runs", "prune", done, "--yes")[::2] == (2, f"no run at {done}\n")


def test_prune_leaves_what_is_being_written(called, copies):
    from medkd.files import writing
    root, folders = copies
    begun, = (path for name, path in folders.items() if name.startswith("begun"))
    with writing(begun):
        code, _, error = called("runs", "prune", "--unfinished", "--yes", "--root", root)
    assert code == 2 and "another process is writing" in error and (begun/"params.json").exists()


def test_profile(called):
    code, out, _ = called("profile", "unet3d_tiny", "--classes", "14", "--repeats", "0", "--json")
    row, = json.loads(out)
    assert (code, row["parameters"], row["input"]) == (0, 1_961_012, "1x1x96x96x96") and abs(row["multiply-accumulates"] / 8.12e9 - 1) < .01
    assert called("profile", "unet3d")[0] == 2 and "unet3d_tiny" in called("profile", "unet3d")[2]


def test_tables(called, tmp_path):
    from medkd.manage import find_runs
    for name, dice in (("student-00000001", ".5"), ("kd-00000002", ".75")):
        scored = tmp_path/name/"predictions"/"toy"
        scored.mkdir(parents=True)
        (tmp_path/name/"params.json").write_text("{}")
        (tmp_path/name/"report.json").write_text("{}")
        (scored/"scores.csv").write_text(f"case,class,unit,dice\na,vessel,px,{dice}\n")
    (tmp_path/"differences.csv").write_text("method,p_holm\nkd,0.5\n")
    assert len(find_runs(tmp_path)) == 2
    assert "| toy | kd | 0.750 | 1 |" in called("table", tmp_path)[1]
    assert r"toy & kd & 0.750 & 1 \\" in called("table", tmp_path, "--format", "latex")[1]
    assert called("table", tmp_path, "--name", "differences", "--format", "csv")[1] == "method,p_holm\nkd,0.5\n"
    assert [row["method"] for row in json.loads(called("table", tmp_path, "--json")[1])] == ["kd", "student"]
    assert "did you mean differences" in called("table", tmp_path, "--name", "difference")[2]
