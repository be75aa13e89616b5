"""Processes that die: a DataLoader worker, papermill, a rank. One clear end, nobody left, and the run continues."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import nbformat
import psutil
import pytest
import toy
from test_ddp import recipe_of

from medkd.trainers import fit
from medkd.trainers.checkpoint import read_checkpoint

slow = replace(toy.everything, data=partial(toy.squares, toy.Slow), steps=8, epochs=None)


# a DataLoader worker
class Deadly(toy.Sampled):
    "Its worker is killed, as by the system when memory is short, while it makes the third batch."
    def sample(self, i, rng):
        place = os.environ.get("KILL_WORKER", "")
        if place and os.path.exists(place) and self.seed == 0 and (count(place) == 9):
            os.unlink(place)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(i, rng)


def count(place):
    "Calls so far, of all workers."
    with open(place, "a") as file: file.write("x")
    return os.path.getsize(place)


def test_killed_worker(tmp_path, monkeypatch):
    recipe = replace(toy.everything, data=partial(toy.squares, Deadly), steps=6, epochs=None)
    whole = fit(recipe, tmp_path/"whole"/"run")
    (tmp_path/"calls").touch()
    monkeypatch.setenv("KILL_WORKER", str(tmp_path/"calls"))
    with pytest.raises(RuntimeError, match="DataLoader worker.*(killed by signal|exited unexpectedly).*fewer workers.*same call continues"):
        fit(recipe, tmp_path/"run", workers=2, save_every=0)
    run = fit(recipe, tmp_path/"run", workers=2)
    assert toy.outcome(run.path) == toy.outcome(whole.path)


# papermill
CELL = """
import toy
from dataclasses import replace
from functools import partial
from medkd.trainers import fit
fit(replace(toy.everything, data=partial(toy.squares, toy.Slow), steps=10**5, epochs=None), "run", nproc={nproc}, workers=2, save_every=0)
"""


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_papermill_leaves_nobody(tmp_path, nproc):
    cells = [nbformat.v4.new_code_cell(CELL.format(nproc=nproc))]
    spec = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), tmp_path/"in.ipynb")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]
    with open(tmp_path/"log", "w") as log:
        papermill = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    toy.wait_for(lambda: list(tmp_path.glob("run-*/last.pt")), 120)
    family = psutil.Process(papermill.pid).children(recursive=True)
    assert len(family) >= (3 if nproc == 1 else 8), family # kernel, agent, ranks, their workers
    papermill.kill()
    papermill.wait()
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert read_checkpoint(toy.only_run(tmp_path)/"last.pt")["step"] > 0


# ranks
@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_of(fit(replace(toy.alone, steps=4, epochs=None, seed=5), tmp_path_factory.mktemp("teacher")/"run"))


def test_killed_parent_leaves_nobody_and_the_run_continues(recipe, tmp_path):
    two = fit(recipe, tmp_path/"whole"/"run", nproc=2)
    slow = replace(recipe, data=partial(toy.squares, toy.Slow))
    parent = toy.in_child(fit, slow, tmp_path/"run", nproc=2, save_every=0)
    folder = toy.wait_for(lambda: [p.parent for p in tmp_path.glob("run-*/last.pt")])[0]
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3
    os.kill(parent.pid, signal.SIGKILL)
    started = time.monotonic()
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert time.monotonic() - started < 10
    assert not (folder/"report.json").exists()
    run = fit(slow, tmp_path/"run", nproc=2)
    assert toy.outcome(run.path)["log"] == toy.outcome(two.path)["log"]
    ours, theirs = (toy.outcome(each.path)["state"] for each in (run, two))
    for part in ("objective", "optimiser", "adversary"): assert ours[part] == theirs[part]


def test_interrupt_keeps_a_checkpoint(recipe, tmp_path):
    slow = replace(recipe, data=partial(toy.squares, toy.Slow), steps=400)
    parent = toy.in_child(fit, slow, tmp_path/"run", nproc=2)
    toy.wait_for(lambda: [p for p in tmp_path.glob("*/last.pt")])
    os.kill(parent.pid, signal.SIGINT)
    assert toy.exit_code(parent) == 1
    folder = toy.only_run(tmp_path)
    state = toy.read_checkpoint(folder/"last.pt")
    rows = (folder/"metrics.jsonl").read_text().splitlines()
    assert state["step"] == sum('"train"' in row for row in rows) >= 2


def test_one_failing_rank_ends_all(recipe, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)Traceback.*rank 1 is lost"):
        fit(replace(recipe, trainer=toy.Losing), tmp_path/"run", nproc=2)
    assert time.time() - (toy.only_run(tmp_path)/"raised").stat().st_mtime < 60
    mine = str(tmp_path)
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if mine in line]
