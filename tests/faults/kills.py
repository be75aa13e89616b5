"""Trainings killed by SIGKILL and continued until they are complete, beside the run nothing disturbed.

Every training is forked from the process that trained the reference, so that no trial pays for imports.
"""
import hashlib
import mmap
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

import medkd.files
import medkd.trainers.checkpoint as checkpoint
import medkd.trainers.run as runs
import medkd.trainers.trainer as trainer
from medkd.files import read_json
from medkd.trainers import Trainer, fit
from medkd.trainers.checkpoint import read_checkpoint
from medkd.trainers.run import read_weights

SAID = mmap.mmap(-1, 64) # what the training that runs now is at; its parent reads it after the kill
PLACES = [(Trainer, "build", "building"), (Trainer, "advance", "step {0.step_number}"),
          (Trainer, "validate", "validation after step {0.step_number}"),
          (Trainer, "keep_best", "best weights being written"),
          (trainer, "append_jsonl", "log being written"),
          (trainer, "save_checkpoint", "checkpoint being written"),
          (Trainer, "resume", "resuming"), (Trainer, "finish", "report being written")]


def once():
    "What every `fit` finds out again, source texts and the state of the repository, found out once."
    fitting = sys.modules["medkd.trainers.fit"]
    runs.source_sha256 = fitting.source_sha256 = cache(runs.source_sha256)
    fitting.git_state = lambda folder: None


def say(text): SAID[:] = text.encode()[:64].ljust(64, b"\0")


def said(): return bytes(SAID[:]).rstrip(b"\0").decode()


def marked(owner, name, text):
    "Let the function say where the training is, for as long as it runs."
    function = getattr(owner, name)
    def saying(*args, **kwargs):
        before = said()
        say(text.format(*args))
        result = function(*args, **kwargs)
        say(before)
        return result
    setattr(owner, name, saying)


# points that a random instant seldom hits: each ends the process like a power cut
def die(*_): os.kill(os.getpid(), signal.SIGKILL)


def half_written(name, count):
    "Half of the file is in its temporary place."
    def writing(path, data, write=medkd.files.write_temporary):
        if path.name == name and next(calls) == count:
            say(f"{name} half written")
            write(path, data[:len(data) // 2])
            die()
        return write(path, data)
    calls = iter(range(1, 10**6))
    medkd.files.write_temporary = checkpoint.write_temporary = writing


def between_renames(count):
    "The old checkpoint has become the previous one, the new one has not yet its name."
    def renaming(source, target, rename=os.replace):
        if Path(target).name == "last.pt" and Path(target).with_name("previous.pt").exists() and next(calls) == count:
            say("between the two renames of a checkpoint")
            die()
        return rename(source, target)
    calls = iter(range(1, 10**6))
    os.replace = renaming


def before_checkpoint(count):
    "The log holds rows that no checkpoint counts."
    def saving(*args, save=trainer.save_checkpoint):
        if next(calls) == count:
            say("log written, checkpoint not yet")
            die()
        return save(*args)
    calls = iter(range(1, 10**6))
    trainer.save_checkpoint = saving


POINTS = [(half_written, "last.pt", 1), (half_written, "last.pt", 2), (half_written, "best.safetensors", 1),
          (between_renames, 1), (before_checkpoint, 1), (before_checkpoint, 2)]


# a training in a child
def train(stage, root, workers, point, errors):
    "What a child does: the stage's `fit`, output thrown away, errors into a file."
    os.setsid()
    null, log = os.open(os.devnull, os.O_WRONLY), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 1), os.dup2(log, 2)
    say("starting")
    for place in PLACES: marked(*place)
    if point: point[0](*point[1:])
    fit(stage.recipe, root/stage.name, workers=workers, save_every=0)
    os._exit(0)


def start(stage, root, workers, point=None):
    child = multiprocessing.get_context("fork").Process(target=train, args=(stage, root, workers, point, root/"errors.txt"))
    child.start()
    return child


def kill_after(child, seconds):
    "SIGKILL after so long: the processes the child had; None when it was complete before."
    child.join(seconds)
    if child.exitcode is not None: return None
    family = []
    with suppress(psutil.Error): family = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return family if child.exitcode == -signal.SIGKILL else None


def unreadable(folder):
    "Files of a killed run that cannot be read: there must be none."
    bad = []
    for name, read in {"last.pt": read_checkpoint, "previous.pt": read_checkpoint, "best.safetensors": read_weights,
                       "params.json": read_json, "env.json": read_json, "report.json": read_json}.items():
        try:
            if (folder/name).exists(): read(folder/name)
        except Exception as error: bad.append(f"{name}: {error}")
    return bad


def result(folder):
    "sha256 of all that two runs must share, bit by bit: weights, last checkpoint, log, report without its times."
    report = {k: v for k, v in read_json(folder/"report.json").items() if k not in ("seconds", "peak_memory")}
    files = [hashlib.sha256((folder/name).read_bytes()).hexdigest() for name in ("best.safetensors", "metrics.jsonl")]
    state = read_checkpoint(folder/"last.pt") | dict(seconds=0)
    return hashlib.sha256(repr([files, short(state), sorted(report.items())]).encode()).hexdigest()


def short(value):
    "Nested containers with the sha256 of each tensor in its place."
    if torch.is_tensor(value): return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict): return sorted((repr(name), short(part)) for name, part in value.items())
    return [short(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)


def trial(stage, expected, root, instants, workers=2, point=None, limit=120):
    """One row of the report: the stage trained under `root`, killed at these instants (seconds after
    its start, one for each try) or at the point, then continued to its end."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    hit, orphans, bad = [], [], []
    for seconds in [*instants, *([limit] if point else [])]:
        left = kill_after(child := start(stage, root, workers, point), seconds)
        if point and child.exitcode == -signal.SIGKILL: left = []
        if left is None: break
        hit.append(dict(seconds=None if point else round(seconds, 3), at=said()))
        orphans += left
        for folder in root.glob("*-????????"): bad += unreadable(folder)
    child = start(stage, root, workers)
    child.join(limit)
    if child.exitcode is None: child.kill()
    folder = root/stage.reference.name
    done = child.exitcode == 0 and (folder/"report.json").exists()
    return dict(paper=stage.paper, stage=stage.name, kills=hit, unreadable=bad, resumed=done,
                identical=done and result(folder) == expected,
                error="" if done else (root/"errors.txt").read_text()[-2000:]), orphans


def left_behind(orphans, seconds=10):
    "Names of processes that outlive the training they belonged to."
    return [p.name() for p in psutil.wait_procs(orphans, timeout=seconds)[1] if p.is_running()]


def trials(stages, root, kills, seed=0, points=1, workers=2):
    """Rows until there are `kills` kills at random instants and every stage is hit, then `points`
    rounds of the chosen points over the stages; and the names of processes left behind."""
    rng, rows, orphans = random.Random(seed), [], []
    expected, seconds = [result(stage.reference) for stage in stages], [stage.seconds for stage in stages]
    turn = 0
    while sum(len(row["kills"]) for row in rows) < kills or turn < len(stages):
        i = turn % len(stages)
        instants = [rng.uniform(0, seconds[i]) for _ in range(1 + (rng.random() < .25))]
        started = time.monotonic()
        row, left = trial(stages[i], expected[i], root/"trial", instants, workers)
        orphans += left
        if row["kills"] or not row["identical"]:
            rows.append(row)
            turn += 1
        else: seconds[i] = min(seconds[i], time.monotonic() - started) * .7 # it was complete before
    for i, point in enumerate(POINTS * points):
        at = (7 * i + 1) % len(stages)
        row, left = trial(stages[at], expected[at], root/"trial", [], workers, point)
        rows.append(row)
    return rows, left_behind(orphans)
