"""The first 20 losses of Graph Flow's trainings on a phantom are what they were.

As for GKD, rounding grows by about 10^5 within 20 steps of a training from scratch: `float32` has a learning rate that
keeps it small, and everything with the discriminator; `float64` has the paper's own learning rate, without the
discriminator. The numbers are written by `python tests/test_golden_graph_flow.py`.
"""
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from notebooks import cache, shared  # noqa: F401

from medkd.data import load
from medkd.files import read_json, write_json
from medkd.losses.graph_flow import GraphFlow, Paraphrase, Paraphraser, read_tap, stepped_poly
from medkd.losses.logits import KD
from medkd.losses.skd import Holistic
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit, poly

GOLDEN = Path(__file__).with_name("golden_graph_flow.json")
STEPS = 20
ARITHMETIC = dict(float32=dict(lr=1e-6, patch=64, batch=1), float64=dict(lr=3e-3, patch=32, batch=2))


def network(arithmetic, make, seed=None):
    "A network of this arithmetic; with a seed, a fixed one that counts as trained."
    if seed is None: return make().to(getattr(torch, arithmetic))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network(arithmetic, make).eval()


def unscored(net, loader): return dict(dice=0.)


def curves(arithmetic):
    "Losses of every step: training -> term -> 20 numbers."
    lr, patch, batch = ARITHMETIC[arithmetic].values()
    data = load("phantom:chasedb1", patch=patch)
    for arrays in data.train.arrays: arrays["image"] = arrays["image"].astype(arithmetic)
    student, teacher = partial(build, "erfnet", width=.25), network(arithmetic, partial(build, "fanet", width=.125), 7)
    base = Recipe(data=data, student=partial(network, arithmetic, student), terms=(partial(Seg, F.cross_entropy), KD),
                  teacher=teacher, weights=dict(seg=1, kd=1), steps=STEPS, batch_size=batch, precision="fp32", lr=lr,
                  validate=unscored, optimiser=partial(torch.optim.Adam, weight_decay=2e-4), schedule=stepped_poly)
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"paraphraser_{tap}": fit(replace(
            base, student=partial(network, arithmetic, partial(Paraphraser, 32, 16)), student_input=partial(read_tap, tap=tap),
            terms=(partial(Paraphrase, tap),), weights=dict(paraphrase=1), schedule=poly,
            optimiser=partial(torch.optim.SGD, momentum=.9, weight_decay=2e-4)), f"{folder}/{tap}") for tap in ("encoder", "decoder")}
        weights = dict(base.weights, vertex=1e-5, edge=1e-9)
        recipe = replace(base, terms=(*base.terms, partial(GraphFlow, tuple(run.network() for run in runs.values()))), weights=weights)
        if arithmetic == "float32":
            betas = partial(torch.optim.Adam, betas=(.9, .99))
            adversary = partial(Holistic, preprocess="tanh", scale=1., lr=lr, optimiser=betas, schedule=poly)
            recipe = replace(recipe, adversary=adversary, weights=weights | dict(adversarial=.1))
        runs["graph_flow"] = fit(recipe, f"{folder}/graph_flow")
        return {name: by_term(run.metrics("train")) for name, run in runs.items()}


def by_term(rows):
    "term -> its losses, the discriminator's too."
    losses = [row["losses"] | row.get("adversary", {}) for row in rows]
    return {term: [row[term] for row in losses] for term in losses[0]}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_losses_are_what_they_were(arithmetic, cache):  # noqa: F811
    expected, found = read_json(GOLDEN)[arithmetic], curves(arithmetic)
    assert {name: list(terms) for name, terms in found.items()} == {name: list(terms) for name, terms in expected.items()}
    for name, terms in expected.items():
        for term, losses in terms.items():
            assert len(losses) == STEPS
            near_zero = 1e-5 if term in ("adversarial", "discriminator") else 0 # scores, about 0.01 of either sign
            np.testing.assert_allclose(found[name][term], losses, rtol=1e-4, atol=near_zero, err_msg=f"{arithmetic}: {term} of {name}")


if __name__ == "__main__":
    write_json(GOLDEN, {arithmetic: curves(arithmetic) for arithmetic in ARITHMETIC})
