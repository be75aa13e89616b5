"""The benchmarks run, on small cases, and their inputs are what they claim."""
import argparse
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from medkd.core import Term
from medkd.models.zoo import build

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    "Imports a benchmark by name; no module of that name is left behind."
    names = [path.stem for path in FOLDER.glob("*.py")]
    for name in names: monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in names: sys.modules.pop(name, None)


class Elsewhere(Term):
    names, needs = ("elsewhere",), (("nowhere",), ())


@pytest.mark.parametrize("size,classes", [((64, 64), 2), ((64, 64), 5), ((24, 24, 24), 14)])
def test_every_image_of_blobs_has_every_class(benchmark, size, classes):
    image, label = benchmark("common").blobs(3, size, classes)
    assert image.shape == (3, 1, *size) and label.shape == (3, *size)
    assert all(label[b].unique().tolist() == list(range(classes)) for b in range(3))


def test_interleaved_takes_the_smallest_of_all_rounds(benchmark):
    calls = []
    times = benchmark("common").interleaved(
        dict(a=partial(calls.append, "a"), b=partial(calls.append, "b")), 2, dict(b=2))
    assert calls == list("ab" + "abb" * 2)
    assert all(0 <= time < 1 for time in times.values())


def test_every_term_gets_a_row_or_a_reason(benchmark, monkeypatch):
    terms = benchmark("terms")
    classes = terms.term_classes()
    monkeypatch.setattr(terms, "term_classes", lambda: [*classes, Elsewhere])
    setting = terms.Setting((2, 1, 64, 64), 2, partial(build, "fanet", width=.125),
                            partial(build, "mobile_unet", width=.25), "small")
    rows, lacking = terms.measure("small", setting, True)
    rows = {row["term"]: row for row in rows}
    assert {cls.__name__ for cls in classes} | {"Elsewhere"} <= set(rows) | set(lacking)
    assert {"Seg", "KD", "AT"} <= set(rows) and "nowhere" in lacking["Elsewhere"]
    assert all(row["share of the floor"] > 0 and row["peak MiB"] > 0 for row in rows.values())
    assert rows["KD"]["limit"] == .05 and rows["Seg"]["limit"] is None


def test_kd_keeps_one_map_and_makes_no_more_than_its_gradient(benchmark):
    terms = benchmark("terms")
    student, teacher = torch.randn(2, 1, 8, 32, 32, 32)
    student.requires_grad_()
    taps = [dict(out=tensor) for tensor in (student, teacher)] # 8 classes
    forward = partial(terms.logits.kd_kl, taps[0]["out"], taps[1]["out"])
    saved, peak = terms.memory(forward)
    maps = student.numel() * 4 / 2 ** 20
    assert sum(saved.values()) / 2 ** 20 <= 1.01 * maps
    assert peak <= 5 * maps


def test_loader_compares_equal_patches(benchmark):
    loader = benchmark("loader")
    _, folder, _ = loader.find(loader.NAME, None)
    patches = loader.load(loader.NAME).train
    loaders = loader.contestants(patches, folder)
    assert all(loader.throughput(make(3, 0)) > 0 for make, _ in loaders.values())
    broken = loader.Plain(patches, lambda case: {name: array * 0 for name, array in patches.arrays[case].items()})
    with pytest.raises(AssertionError, match="differs"): loader.check_same(patches, [broken])


def test_trainer_and_bare_loop_lose_alike(benchmark):
    row = benchmark("trainer").measure("small", (.25, .125), 64, 2, 4, "fp32")
    assert row["trainer steps/s"] > 0 and row["bare steps/s"] > 0


def test_page_tells_numbers_and_origin(benchmark, tmp_path, capsys):
    common, path = benchmark("common"), tmp_path / "some.json"
    rows = [dict(case="a", ratio=2.5), dict(case="b", ratio=np.float64(.5).item(), more=1)]
    common.report("some", rows, ["ratio: met"], argparse.Namespace(json=path, quick=True), "Note.")
    page = benchmark("run").page(json.loads(path.read_text()))
    assert "| a | 2.5 |  |" in page and "- ratio: met" in page and "torch" in page and "(quick)" in page
    assert "| b | 0.5 | 1 |" in capsys.readouterr().out


def test_volumes_benchmark_compares_equal_labels(benchmark, tmp_path, monkeypatch):
    volumes = benchmark("volumes")
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path))
    monkeypatch.setattr(volumes, "source", lambda: ("phantom:msd", volumes.find("phantom:msd", None)[1]))
    rows = [*volumes.load_rows(1), *volumes.patch_rows((40, 40, 40), (16, 16, 16), 1),
            *volumes.predict_rows((64, 24, 24), (16, 16, 16), 14, 1)]
    assert all(row["ratio"] > 0 for row in rows) and rows[2]["ratio"] < 1 and rows[0]["files"] == 32


def test_acf_bckd_losses_equal_their_plain_forms(benchmark):
    bench = benchmark("acf_bckd")
    rows = {row["loss"]: row for row in bench.measure((1, 1, 16, 16, 16), 5, .125, 1, 1, True)}
    assert set(bench.LIMITS) <= set(rows)
    assert sum(row["plain form / ours"] is not None for row in rows.values()) == 11
    with pytest.raises(AssertionError, match="class"): bench.case((1, 1, 8, 8, 16), 14, .125)


def test_hlfd_equals_its_plain_form(benchmark):
    module = benchmark("sikd_hlfd")
    nets = (partial(build, name, 1, 2, .125) for name in ("unet_plus_plus", "resnet18"))
    rows = module.shares(module.Setting((2, 1, 64, 64), 2, *nets, "small"), True)
    assert {f"HLFD, {name}" for name in module.OBJECTIVES} < {row["what"] for row in rows}
    row, verdict = module.average(True)
    assert row["plain form / ours"] > 0 and "times as fast as the loop" in verdict


def test_slices_benchmark_cuts_every_time(benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path))
    rows = benchmark("slices").measure((6, 32, 32), 2, 2)
    assert len(rows) == 3 and all(row["packed MB/s"] > 0 for row in rows)
