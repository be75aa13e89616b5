"""Damaged files, full disks, interrupts and foreign files: one clear error, and nothing lost."""
import errno
import importlib
import os
import pickle
import resource
import signal
import time
from dataclasses import replace
from functools import partial

import psutil
import pytest
import torch
import toy

from medkd.files import Damaged, make_folder, read_json, seal, write_json, writing
from medkd.trainers import Run, fit
from medkd.trainers.checkpoint import read_checkpoint

recipe = replace(toy.everything, steps=6, epochs=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return toy.outcome(fit(recipe, tmp_path_factory.mktemp("whole")/"run").path)


@pytest.fixture
def stopped(tmp_path):
    "A run that stands after step 5 of 6 with step 4 as the checkpoint before."
    with toy.stopping_after(5), pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path/"run", save_every=0)
    return toy.only_run(tmp_path)


def flip(path): toy.change(path, lambda data: data[:200] + bytes([data[200] ^ 4]) + data[201:])
def cut(path): toy.change(path, lambda data: data[:len(data) // 2])
def zeros(path): toy.change(path, lambda data: bytes(len(data)))
def empty(path): path.write_bytes(b"")
def foreign(path): torch.save(dict(model=torch.ones(3)), path)


# damaged files
@pytest.mark.parametrize("damage", [flip, cut, zeros, empty, foreign])
def test_previous_checkpoint_steps_in(stopped, whole, damage, capsys):
    assert [read_checkpoint(stopped/name)["step"] for name in ("last.pt", "previous.pt")] == [5, 4]
    damage(stopped/"last.pt")
    run = fit(recipe, stopped.parent/"run")
    assert "last.pt" in capsys.readouterr().out
    assert toy.outcome(run.path) == whole


def test_killed_after_falling_back(stopped, whole):
    "The whole checkpoint is not replaced by the damaged one, wherever the process dies."
    flip(stopped/"last.pt")
    for count in (2, 3):
        child = toy.in_child(toy.train_and_die, recipe, stopped.parent/"run", "os.replace", count,
                             save_every=0)
        assert toy.exit_code(child) == -signal.SIGKILL
    assert toy.outcome(fit(recipe, stopped.parent/"run").path) == whole


def test_both_damaged(stopped):
    flip(stopped/"last.pt")
    cut(stopped/"previous.pt")
    before = sorted(p.name for p in stopped.iterdir())
    with pytest.raises(Damaged,
                       match="last.pt.*previous.pt.*delete these files to train this run again"):
        fit(recipe, stopped.parent/"run")
    assert sorted(p.name for p in stopped.iterdir()) == before


def test_both_deleted_starts_again(stopped, whole):
    for name in ("last.pt", "previous.pt"): (stopped/name).unlink()
    assert toy.outcome(fit(recipe, stopped.parent/"run").path) == whole


def test_checkpoint_of_another_run(stopped, tmp_path):
    other = fit(replace(recipe, lr=.5, steps=1), tmp_path/"other")
    (stopped/"last.pt").write_bytes((other.path/"last.pt").read_bytes())
    with pytest.raises(ValueError, match="belongs to run .* use another run folder"):
        fit(recipe, stopped.parent/"run")


def test_log_that_lost_rows(stopped):
    cut(stopped/"metrics.jsonl")
    with pytest.raises(Damaged, match="metrics.jsonl does not hold the 5 steps"):
        fit(recipe, stopped.parent/"run")


@pytest.mark.parametrize("damage", [flip, cut, zeros, empty, foreign])
def test_damaged_best_weights(tmp_path, damage):
    run = fit(replace(toy.alone, steps=1, epochs=None), tmp_path/"run")
    damage(run.path/"best.safetensors")
    for use in (run.network, lambda: fit(replace(toy.distil, teacher=run), tmp_path/"student")):
        with pytest.raises(Damaged,
                           match="best.safetensors is damaged.*put a copy of it back"):
            use()


def test_damaged_best_weights_are_found_on_resume(stopped):
    cut(stopped/"best.safetensors")
    with pytest.raises(Damaged, match="best.safetensors"): fit(recipe, stopped.parent/"run")


# foreign files
class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_pickles_never_run(stopped, tmp_path):
    bomb = tmp_path/"exploded"
    torch.save(dict(step=Bomb(bomb)), tmp_path/"bomb.pt")
    for data in ((tmp_path/"bomb.pt").read_bytes(), pickle.dumps(Bomb(bomb))):
        for name in ("last.pt", "previous.pt"): (stopped/name).write_bytes(seal(data))
        with pytest.raises(Damaged): fit(recipe, stopped.parent/"run")
        (stopped/"best.safetensors").write_bytes(data)
        with pytest.raises(Damaged): Run(stopped).sha256
    assert not bomb.exists()


@pytest.mark.parametrize("student", [
    {"call": "os:system", "args": ["touch pwned"]},
    {"call": "posix:system", "args": ["touch pwned"]},
    {"call": "medkd.losses.task:F.os.system", "args": ["touch pwned"]},
    {"call": "torch.nn:functional.importlib.import_module", "args": ["antigravity"]},
    {"call": "medkd.models.zoo:build", "kwargs": {"name": {"call": "os:getcwd"}}},
    {"call": "medkd.files:write_atomic", "args": ["pwned", "x"]},
    {"origin": {"call": "medkd.inference:predict", "args": ["os:system", "touch pwned"]}},
    {"call": "builtins:exec", "args": ["open('pwned', 'w')"]},
])
def test_foreign_params_name_only_networks(tmp_path, monkeypatch, student):
    monkeypatch.chdir(tmp_path)
    run = fit(replace(toy.alone, steps=1, epochs=None), tmp_path/"run")
    params = run.params
    params["recipe"]["student"] = student
    write_json(run.path/"params.json", params)
    with pytest.raises((PermissionError, AttributeError)): Run(run.path).network()
    assert not (tmp_path/"pwned").exists()


def test_own_packages_are_named_to_be_trusted(tmp_path):
    run = fit(replace(toy.alone, steps=1, epochs=None), tmp_path/"run")
    with pytest.raises(PermissionError, match=r"toy:Net is outside.*allow=\(...\)"):
        Run(run.path).network()
    assert isinstance(Run(run.path, allow=("toy",)).network(), toy.Net)


# no space left, no permission, two writers
def full(recipe, root, writer, report):
    "`fit` where a file can grow no further in `writer`; the error is written to `report`."
    trainer = importlib.import_module("medkd.trainers.trainer")
    write = getattr(trainer, writer)
    def limited(path, *args, **kwargs):
        size = {"save_checkpoint": path/"last.pt", "save_weights": path,
                "append_jsonl": path}[writer].stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE,
                           (size + 9 if writer == "append_jsonl" else size - 9, before[1]))
        try: write(path, *args, **kwargs)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with toy.patched(trainer, writer, limited):
        try: fit(recipe, root, save_every=0)
        except Exception as error: report.write_text(f"{type(error).__name__} {error}")


@pytest.mark.parametrize("writer, name",
                         [("save_checkpoint", "last.pt"), ("save_weights", "best.safetensors"),
                                          ("append_jsonl", "metrics.jsonl")])
def test_no_space_left(tmp_path, whole, writer, name):
    with toy.stopping_after(3), pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path/"run", save_every=0)
    folder = toy.only_run(tmp_path)
    assert toy.exit_code(toy.in_child(full, recipe, tmp_path/"run", writer, tmp_path/"error")) == 0
    error = (tmp_path/"error").read_text()
    assert error.startswith("OSError") and f"cannot write {folder/name} " in error
    assert "no space left" in error
    assert read_checkpoint(folder/"last.pt")["step"] == 3 and not list(folder.glob(".*.tmp"))
    assert toy.outcome(fit(recipe, tmp_path/"run").path) == whole


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises(OSError, match="cannot make the folder .*file"):
        fit(toy.alone, tmp_path/"file"/"run")


def test_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no write permission in the folder") as caught:
        fit(toy.alone, tmp_path/"run")
    assert caught.value.errno == errno.EACCES
    with pytest.raises(PermissionError): make_folder(tmp_path)


def test_complete_run_in_a_folder_without_permission(tmp_path, monkeypatch):
    run = fit(replace(toy.alone, steps=1, epochs=None), tmp_path/"run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert fit(replace(toy.alone, steps=1, epochs=None), tmp_path/"run").sha256 == run.sha256


def test_two_writers(tmp_path):
    recipe = replace(slow, steps=2000)
    child = toy.in_child(fit, recipe, tmp_path/"run")
    toy.wait_for(lambda: list(tmp_path.glob("*/last.pt")))
    with pytest.raises(RuntimeError, match="another process is writing into .*run-"):
        fit(recipe, tmp_path/"run")
    child.kill()
    toy.exit_code(child)
    with writing(toy.only_run(tmp_path)): pass


# interrupts
slow = replace(toy.everything, data=partial(toy.squares, toy.Slow), steps=8, epochs=None)


@pytest.fixture(scope="module")
def whole_slow(tmp_path_factory):
    return toy.outcome(fit(slow, tmp_path_factory.mktemp("whole")/"run").path)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_signal_to_the_whole_group(tmp_path, whole_slow, number, code):
    "As a terminal or a kernel's stop button sends it: DataLoader workers get it, too."
    child = toy.in_child(fit, slow, tmp_path/"run", workers=2)
    toy.wait_for(lambda: list(tmp_path.glob("run-*/last.pt")))
    family = psutil.Process(child.pid).children(recursive=True)
    assert len(family) >= 2
    os.killpg(child.pid, number)
    assert toy.exit_code(child) == code
    assert not psutil.wait_procs(family, timeout=5)[1]
    folder, = tmp_path.glob("run-*")
    assert not (folder/"report.json").exists()
    assert 2 <= read_checkpoint(folder/"last.pt")["step"] < 8
    assert toy.outcome(fit(slow, tmp_path/"run").path) == whole_slow


def test_interrupt_leaves_no_worker(tmp_path):
    "Even while the exception, and with it every frame, is kept, as a notebook keeps it."
    before = signal.getsignal(signal.SIGINT) # ignored in a shell's background, Python's own elsewhere
    with toy.interrupting_in_step(3), pytest.raises(KeyboardInterrupt) as caught:
        fit(slow, tmp_path/"run", workers=2)
    end = time.monotonic() + 5
    while (left := toy.loader_workers()) and time.monotonic() < end: time.sleep(.05)
    assert not left and caught.value.__traceback__
    assert read_checkpoint(toy.only_run(tmp_path)/"last.pt")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_half_written_folder(tmp_path):
    "Killed before params.json was written: the next call starts as if there were nothing."
    child = toy.in_child(toy.train_and_die, toy.alone, tmp_path/"run",
                         "medkd.trainers.fit.write_json", 2)
    assert toy.exit_code(child) == -signal.SIGKILL
    run = fit(toy.alone, tmp_path/"run")
    assert run.complete and read_json(run.path/"params.json")["hash"] in run.path.name
    assert run.report["steps"] == 8
