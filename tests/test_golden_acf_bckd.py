"""The first 20 losses of ACF-BCKD and of its comparators on the paper's networks, small, are what they were.

Written by `python tests/test_golden_acf_bckd.py`.
"""
import hashlib
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medkd.data.base import Splits
from medkd.files import read_json, write_json
from medkd.losses.acf_bckd import ACFBCKD, acf_bckd_weights
from medkd.losses.at import AT
from medkd.losses.cirkd import CIRKD
from medkd.losses.ifvd import IFVD
from medkd.losses.logits import CWD, DIST, DKD, KD, NKD
from medkd.losses.skd import SKD
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers import Recipe, fit

GOLDEN = Path(__file__).with_name("golden_acf_bckd.json")
STEPS = 20
LEVELS = "e1", "e2", "e3", "e4", "d3", "d2", "out"


class Lumps:
    "Volumes of 16^3 with three classes in smooth shapes."
    def __init__(self, n, seed):
        rng = torch.Generator().manual_seed(seed)
        field = F.interpolate(torch.randn(n, 3, 4, 4, 4, generator=rng), size=16, mode="trilinear")
        self.seed, self.label = seed, (field + torch.tensor([.3, 0, 0]).view(3, 1, 1, 1)).argmax(1)
        self.image = self.label[:, None] + .5 * torch.randn(n, 1, 16, 16, 16, generator=rng)

    def __len__(self): return len(self.label)

    def __getitem__(self, i):
        return dict(image=self.image[i], label=self.label[i], case=f"case{self.seed}-{i}")


def lumps():
    sha256 = hashlib.sha256(b"lumps").hexdigest()
    return Splits("lumps", Lumps(8, 0), Lumps(1, 1), Lumps(1, 2), ("background", "a", "b"), sha256)


def teacher():
    "A fixed network that counts as trained."
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build("resunet3d", 1, 3, .125)


teacher.loads_weights = True


def unscored(net, loader): return dict(dice=0.)


METHODS = dict(
    acf_bckd=((Seg, ACFBCKD), dict(seg=1, **acf_bckd_weights(.1, .5))),
    comparators=(
        (Seg, partial(KD, mode="sigmoid_mse"), partial(AT, LEVELS), NKD, partial(SKD, "head_in", reduction="reference"), DKD, CWD, DIST,
         IFVD, partial(CIRKD, "head_in", pixels=64, regions=8, sampled=16)),
        dict(seg=1, kd=10, at=200, nkd=1, pixelwise=10, pairwise=1, dkd=.1, cwd=1, dist=1, ifvd=200, minibatch=1, pixel=.1, region=.1)))


def curve(name, folder):
    "term -> 20 losses."
    terms, weights = METHODS[name]
    recipe = Recipe(data=lumps, student=partial(build, "unet3d_tiny", 1, 3, .125), teacher=teacher, terms=terms,
                    weights=weights, steps=STEPS, batch_size=2, lr=1e-4, precision="fp32", validate=unscored)
    rows = fit(recipe, f"{folder}/{name}").metrics("train")
    return {term: [row["losses"][term] for row in rows if term in row["losses"]] for term in recipe.weights}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_what_they_were(name, tmp_path):
    expected, found = read_json(GOLDEN)[name], curve(name, tmp_path)
    assert list(found) == list(expected)
    for term, losses in expected.items():
        np.testing.assert_allclose(found[term], losses, rtol=1e-4, err_msg=f"{term} of {name}")
    assert len(found["seg"]) == STEPS


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_json(GOLDEN, {name: curve(name, folder) for name in METHODS})
