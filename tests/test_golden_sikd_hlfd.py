"""The first 20 losses of SIKD's and HLFD's trainings on phantoms are what they were.

The learning rate is so small that rounding stays small, as in test_golden_gkd.py. The numbers are written by
`python tests/test_golden_sikd_hlfd.py`.
"""
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import medkd.data as data
from medkd.files import read_json, write_json
from medkd.losses.hlfd import HLFD, cosine_steps
from medkd.losses.sikd import SIKD, averaged
from medkd.losses.task import Seg, focal_dice
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit
from medkd.trainers.recipe import piecewise

GOLDEN = Path(__file__).with_name("golden_sikd_hlfd.json")
STEPS = 20


def unscored(net, loader): return dict(dice=0.)


def sikd(root):
    "name -> recipe, from the trained ones before: the oracle, its student alone and with SIKD."
    cases = ["patient001", "patient003", "patient002", "patient004"]
    data.phantom("acdc", root, cases, (4, 48, 40))
    net = {name: partial(build, name, 1, 4, .125, init="kaiming") for name in ("unet", "unet_noskip")}
    show = partial(averaged, num_classes=4)
    alone = Recipe(data=data.load("phantom:acdc", root, size=32), student=net["unet"], steps=STEPS, batch_size=4,
                   terms=(partial(Seg, F.cross_entropy),), weights=dict(seg=1), optimiser=torch.optim.Adam,
                   schedule=partial(piecewise, ends=(.3, .5, .75, .9), factors=(1, .5, .25, .125, .0625)))
    yield "teacher", lambda runs: replace(alone, student=net["unet_noskip"], student_input=show)
    yield "sikd", lambda runs: replace(alone, teacher=runs["teacher"], teacher_input=show, terms=(*alone.terms, SIKD),
                                       weights=dict(seg=1, sikd=2.))


def hlfd(root):
    "name -> recipe, as above: the teacher, and HLFD."
    cases = ["case_00001", "case_00003", "case_00005", "case_00000"]
    data.phantom("kits19", root, cases, (6, 64, 64))
    alone = Recipe(data=data.load("phantom:kits19", root, size=32, task="organ"), student=partial(build, "resnet18", 1, 2, .125),
                   terms=(partial(Seg, focal_dice),), weights=dict(seg=1), steps=STEPS, batch_size=4,
                   optimiser=torch.optim.Adam, schedule=cosine_steps)
    yield "teacher", lambda runs: replace(alone, student=partial(build, "unet_plus_plus", 1, 2, .125))
    yield "hlfd", lambda runs: replace(alone, teacher=runs["teacher"], terms=(*alone.terms, HLFD),
                                       weights=dict(seg=1, pixel=.1, feature=.9))


def curves(paper):
    "Losses of every step: training -> term -> 20 numbers."
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, make in paper(Path(folder, "data")):
            recipe = replace(make(runs), lr=1e-6, precision="fp32", validate=unscored, validate_every=STEPS)
            runs[name] = fit(recipe, f"{folder}/{name}")
        return {name: by_term(run.metrics("train")) for name, run in runs.items()}


def by_term(rows): return {term: [row["losses"][term] for row in rows] for term in rows[0]["losses"]}


@pytest.mark.parametrize("paper", [sikd, hlfd])
def test_losses_are_what_they_were(paper, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path/"cache"))
    expected, found = read_json(GOLDEN)[paper.__name__], curves(paper)
    assert {name: list(terms) for name, terms in found.items()} == {name: list(terms) for name, terms in expected.items()}
    for name, terms in expected.items():
        for term, losses in terms.items():
            assert len(losses) == STEPS
            np.testing.assert_allclose(found[name][term], losses, rtol=1e-4, err_msg=f"{term} of {name}")


if __name__ == "__main__":
    write_json(GOLDEN, {paper.__name__: curves(paper) for paper in (sikd, hlfd)})
