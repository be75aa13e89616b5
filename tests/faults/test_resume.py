"""A run that was killed and continued ends in the same bits as one that was not."""
import signal
from dataclasses import replace
from functools import partial

import pytest
import toy

from medkd.trainers import Trainer, fit

everything = replace(toy.everything, steps=6, epochs=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nothing disturbed."
    return toy.outcome(fit(everything, tmp_path_factory.mktemp("whole")/"run").path)


@pytest.mark.parametrize("where, count, when", [
    ("Trainer.step", 4,
     "after"),                             # in mid-epoch, nothing saved of step 4
    ("Trainer.save", 1, "after"),                             # at the end of the first epoch
    ("medkd.trainers.trainer.append_jsonl", 1,
     "after"),      # the log is ahead of the first checkpoint
    ("medkd.trainers.trainer.append_jsonl", 2, "after"),      # and of a later one
    ("medkd.trainers.checkpoint.write_temporary", 3, "after"), # written, not yet in its place
    ("os.replace", 5, "before"), ("os.replace", 6, "before"), ("os.replace", 7, "before"),
    ("os.replace", 8, "before"), ("os.replace", 9, "after"),
    ("medkd.trainers.trainer.write_json", 2, "before"),       # trained, the report not yet written
])
def test_sigkill(tmp_path, whole, where, count, when):
    child = toy.in_child(toy.train_and_die, everything, tmp_path/"run", where, count, when,
                         save_every=0)
    assert toy.exit_code(child) == -signal.SIGKILL
    assert not (toy.only_run(tmp_path)/"report.json").exists()
    run = fit(everything, tmp_path/"run")
    assert toy.outcome(run.path) == whole
    assert not list(run.path.glob(".*.tmp"))


@pytest.mark.parametrize("kind", [toy.Sampled, toy.Careless])
def test_sigkill_with_workers(tmp_path, kind):
    recipe = replace(everything, data=partial(toy.squares, kind))
    expected = toy.outcome(fit(recipe, tmp_path/"whole"/"run").path)
    child = toy.in_child(toy.train_and_die, recipe, tmp_path/"run", "Trainer.step", 4, workers=2,
                         save_every=0)
    assert toy.exit_code(child) == -signal.SIGKILL
    folder, = tmp_path.glob("run-*")
    assert len((folder/"metrics.jsonl").read_text().splitlines()) == 4
    assert toy.outcome(fit(recipe, tmp_path/"run", workers=2).path) == expected


def test_saving_often_changes_nothing(tmp_path, whole):
    assert toy.outcome(fit(everything, tmp_path/"run", save_every=0).path) == whole


def test_generators_outside_do_not_matter(tmp_path, whole):
    import random
    random.seed(5)
    assert toy.outcome(fit(everything, tmp_path/"run").path) == whole


def test_another_trainer_is_another_run(tmp_path):
    paths = {fit(replace(toy.alone, steps=1, epochs=None, trainer=t), tmp_path/"run").path
             for t in (None, Trainer, toy.Digests)}
    assert len(paths) == 3
