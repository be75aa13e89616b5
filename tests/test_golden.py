"""A golden curve: 20 steps of student + KD + AT on toy data, float32, CPU."""
from dataclasses import replace

import pytest
import toy

from medkd.trainers import fit

recipe = replace(toy.distil, student=toy.Net, steps=20, epochs=None)
GOLDEN = dict(
    seg=[1.24162, 1.18417, 1.15288, 1.12347, 1.09668, 1.06645, 1.04382, 1.02299, 1.00671,
        0.981248, 0.974058, 0.956787, 0.939075, 0.932554, 0.92366, 0.901958, 0.904756,
        0.903258, 0.893573, 0.882237],
    kd=[0.0574618, 0.0476463, 0.0394528, 0.0381914, 0.0387501, 0.0383223, 0.0413067, 0.0431613,
        0.0473324, 0.0492633, 0.0543393, 0.054753, 0.0594783, 0.0622403, 0.0664053, 0.0652325,
        0.0685689, 0.0689707, 0.072059, 0.0717916],
    at=[0.0175493, 0.0149481, 0.012897, 0.0125273, 0.0127146, 0.0101477, 0.00956269, 0.0102151,
        0.00927892, 0.00781523, 0.0089759, 0.00725937, 0.00773149, 0.00742384, 0.00747178,
        0.00659415, 0.00726382, 0.00619331, 0.00715445, 0.00622658],
)


def test_golden_curve(tmp_path):
    rows = fit(recipe, tmp_path/"run").metrics("train")
    for name, curve in GOLDEN.items():
        assert [row["losses"][name] for row in rows] == pytest.approx(curve, rel=1e-4), name
