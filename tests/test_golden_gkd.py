"""The first 20 losses of every training of a paper notebook on its phantom are what they were.

The recipes are those of the notebook's own cells, with a learning rate so small that rounding stays small: at the recipe's
own, two instruction sets of one processor part by over 1 % within 20 steps, in float64 too. With this one they part by
less than 5e-5. The numbers are written by `python tests/test_golden_gkd.py`.
"""
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from notebooks import Cells

from medkd.files import read_json, write_json

GOLDEN = Path(__file__).with_name("golden_gkd.json")
STEPS = 20
ARITHMETIC = dict(float32=dict(lr=1e-6, patch=64))


def unscored(net, loader): return dict(dice=0.)


def curves(arithmetic):
    "Losses of every step: training -> term -> 20 numbers."
    lr, patch = ARITHMETIC[arithmetic].values()
    cells = Cells(preset="smoke", precision="fp32", steps=STEPS, teacher_steps=STEPS, methods="kd,at", teacher="fanet")
    cells.run_to("make_folder(runs)")
    here = cells.namespace
    here["load_present"] = lambda *names, **options: {} # the targets are not trained on
    cells.run_to("source = load(", skip=["figure("])
    here["source"] = here["load"]("phantom:chasedb1", patch=patch)
    for arrays in here["source"].train.arrays: arrays["image"] = arrays["image"].astype(arithmetic)
    cells.run_to("baseline = ", skip=["figure("])
    student = replace(here["baseline"], student=here["make_student"], validate=unscored, **(dict(lr=lr) if lr else {}))
    with tempfile.TemporaryDirectory() as folder:
        runs = dict(teacher=here["fit"](replace(student, student=here["make_teacher"]), f"{folder}/teacher"))
        for name, (terms, weights) in dict(student=(student.terms, student.weights), **here["wanted"]).items():
            teacher = runs["teacher"] if name in here["wanted"] else None
            runs[name] = here["fit"](replace(student, teacher=teacher, terms=terms, weights=weights), f"{folder}/{name}")
        return {name: by_term(run.metrics("train")) for name, run in runs.items()}


def by_term(rows): return {term: [row["losses"][term] for row in rows] for term in rows[0]["losses"]}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_losses_are_what_they_were(arithmetic, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    expected, found = read_json(GOLDEN)[arithmetic], curves(arithmetic)
    assert {name: list(terms) for name, terms in found.items()} == {name: list(terms) for name, terms in expected.items()}
    for name, terms in expected.items():
        for term, losses in terms.items():
            assert len(losses) == STEPS
            np.testing.assert_allclose(found[name][term], losses, rtol=1e-4, err_msg=f"{arithmetic}: {term} of {name}")


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "agg")
    write_json(GOLDEN, {arithmetic: curves(arithmetic) for arithmetic in ARITHMETIC})
