"""The first 20 losses of Graph Flow's trainings on a phantom are what they were.

Everything is in float64, from weights that NumPy draws: torch's normal numbers differ in their last bit between two
instruction sets of one processor, and a training makes much of that. The numbers are written by
`python tests/test_golden_graph_flow.py`.
"""
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medkd.data import load
from medkd.files import read_json, write_json
from medkd.losses.graph_flow import GraphFlow, Paraphrase, Paraphraser, read_tap, stepped_poly
from medkd.losses.logits import KD
from medkd.losses.skd import Holistic, SpectralNorm
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit, poly

GOLDEN = Path(__file__).with_name("golden_graph_flow.json")
STEPS = 20


def network(make, seed=0):
    "A network in float64, its weights drawn by NumPy as by torch's usual initialisation."
    net, rng = make().double(), np.random.default_rng(seed)
    for module in net.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter): nn.init.zeros_(module.bias)
    for weight in (p for p in net.parameters() if p.ndim > 1):
        bound = 1 / weight[0].numel() ** .5
        weight.data.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(weight.shape))))
    return net


class Judge(Holistic):
    "The discriminator, too."
    def build(self, *shapes):
        super().build(*shapes)
        self.net = network(lambda: self.net, 9)
        for norm in (m for m in self.net.modules() if isinstance(m, SpectralNorm)):
            for vector, seed in ((norm.u, 0), (norm.v, 1)):
                drawn = np.random.default_rng(seed).normal(size=len(vector))
                vector.copy_(torch.from_numpy(drawn / np.linalg.norm(drawn)))


def unscored(net, loader): return dict(dice=0.)


def curves():
    "Losses of every step: training -> term -> 20 numbers."
    data = load("phantom:chasedb1", patch=64)
    for arrays in data.train.arrays: arrays["image"] = arrays["image"].astype(np.float64)
    student, teacher = partial(build, "erfnet", width=.25), network(partial(build, "fanet", width=.125), 7).eval()
    base = Recipe(data=data, student=partial(network, student), terms=(partial(Seg, F.cross_entropy), KD),
                  teacher=teacher, weights=dict(seg=1, kd=1), steps=STEPS, batch_size=1, precision="fp32", lr=1e-4,
                  validate=unscored, optimiser=partial(torch.optim.Adam, weight_decay=2e-4), schedule=stepped_poly)
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"paraphraser_{tap}": fit(replace(
            base, student=partial(network, partial(Paraphraser, 32, 16)), student_input=partial(read_tap, tap=tap),
            terms=(partial(Paraphrase, tap),), weights=dict(paraphrase=1), schedule=poly,
            optimiser=partial(torch.optim.SGD, momentum=.9, weight_decay=2e-4)), f"{folder}/{tap}") for tap in ("encoder", "decoder")}
        betas = partial(torch.optim.Adam, betas=(.9, .99))
        runs["graph_flow"] = fit(replace(
            base, terms=(*base.terms, partial(GraphFlow, tuple(run.network() for run in runs.values()))),
            weights=dict(base.weights, vertex=1e-5, edge=1e-9, adversarial=.1),
            adversary=partial(Judge, preprocess="tanh", width=.25, scale=1., lr=1e-4, optimiser=betas, schedule=poly)), f"{folder}/graph_flow")
        return {name: by_term(run.metrics("train")) for name, run in runs.items()}


def by_term(rows):
    "term -> its losses, the discriminator's too."
    losses = [row["losses"] | row.get("adversary", {}) for row in rows]
    return {term: [row[term] for row in losses] for term in losses[0]}


def test_losses_are_what_they_were(cache):
    expected, found = read_json(GOLDEN), curves()
    assert {name: list(terms) for name, terms in found.items()} == {name: list(terms) for name, terms in expected.items()}
    for name, terms in expected.items():
        for term, losses in terms.items():
            assert len(losses) == STEPS
            np.testing.assert_allclose(found[name][term], losses, rtol=1e-4, err_msg=f"{term} of {name}")


if __name__ == "__main__": write_json(GOLDEN, curves())
