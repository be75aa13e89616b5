"""Two processes on one machine: equal parameters, the same curve, clean ends."""
from dataclasses import replace
from functools import partial

import pytest
import toy
from torch import nn

from medkd.files import read_json
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import fit


def recipe_of(teacher):
    "Projector, queue, discriminator; a run as teacher and in a term; no batch statistics."
    return replace(
        toy.alone, teacher=teacher, adversary=partial(toy.Judge, norm=False,
                                                      lr=1e-3), steps=6, epochs=None,
        trainer=toy.Digests, terms=(Seg, KD, toy.Projected, toy.Queued,
                                    partial(toy.Assisted, assistant=teacher)),
        weights=dict(seg=1, kd=.5, projected=.1, queued=.1, assisted=.1, adversarial=.01))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipe_of(fit(replace(toy.alone, steps=4, epochs=None, seed=5),
                         tmp_path_factory.mktemp("teacher")/"run"))


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    "The undisturbed run of two processes."
    return fit(recipe, tmp_path_factory.mktemp("two")/"run", nproc=2)


def test_all_ranks_end_equal(two):
    first, second = (read_json(two.path/f"rank{rank}.json") for rank in (0, 1))
    assert first == second
    assert two.report["processes"] == 2


def test_curve_and_queue_of_one_process(two, recipe, tmp_path):
    one = fit(recipe, tmp_path/"run")
    assert one.path.name == two.path.name
    for ours, theirs in zip(two.metrics("train"), one.metrics("train"), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["adversary"] == pytest.approx(theirs["adversary"], rel=1e-4)
    keys = [sorted(read_json(run.path/"rank0.json")["keys"]) for run in (one, two)]
    assert len(keys[0]) == 12
    for ours, theirs in zip(*keys): assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("change, named", [
    (dict(student=lambda: toy.Net()), "<lambda>"),
    (dict(student=toy.Net()), "student: Net"),
    (dict(terms=(partial(Seg, loss=lambda a, b: 0),)), "<lambda>"),
    (dict(weights=dict(seg=lambda epoch: 1.)), "<lambda>"),
    (dict(data=lambda: toy.squares()), "data: .*<lambda>"),
    (dict(data=toy.squares()), "data: these Splits"),
])
def test_what_cannot_travel_is_named(tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        fit(replace(toy.alone, **change), tmp_path/"run", nproc=2)


def test_notebook_definitions_cannot_travel(tmp_path):
    Net = type("Net", (nn.Module,), dict(__module__="__main__", __qualname__="Net"))
    import __main__
    __main__.Net = Net
    try:
        with pytest.raises(ValueError, match="__main__:Net is known to this process only"):
            fit(replace(toy.alone, student=Net), tmp_path/"run", nproc=2)
    finally: del __main__.Net


def test_batch_must_divide(tmp_path):
    with pytest.raises(ValueError, match="batch_size 5 cannot be divided over 2"):
        fit(replace(toy.alone, batch_size=5), tmp_path/"run", nproc=2)


def test_feature_terms_alone(tmp_path):
    "Parameters that no loss reaches, and a term that rests at first, under DDP."
    recipe = replace(toy.alone, student=partial(build, "unet", width=.125), teacher=toy.teacher,
                     terms=(partial(toy.Projected, student="e1"), KD), steps=3, epochs=None,
                     weights=dict(projected=1, kd=toy.from_second_step))
    run = fit(recipe, tmp_path/"run", nproc=2)
    assert ["kd" in row["losses"] for row in run.metrics("train")] == [False, True, True]
