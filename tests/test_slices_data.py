"Two-dimensional slice sets: volumes scored from stored slices; ACDC, Gastric and Synapse in official layout; unlabelled cases."
import numpy as np
import pytest
import torch

import medkd.data as data
from medkd.inference import read_volume, score_volumes, store_predictions
from medkd.metrics import dice
from medkd.papers import stored_scores
from medkd.surface import hd95


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    root = tmp_path_factory.mktemp("slices")
    data.phantom("chaos", root, ["1", "2", "5", "6"], (8, 64, 72))
    data.phantom("lits", root, ["0", "1", "28"], (8, 64, 72))
    return root


class Bright(torch.nn.Module):
    "Calls liver what is bright."
    def forward(self, image):
        return torch.cat([.5 - image, image - .5], 1) * 20


# volumes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["chaos", "lits"])
def test_volumes_are_scored_on_the_scanners_grid(name, twins, tmp_path):
    splits = data.load(f"phantom:{name}", twins, size=48)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    scores = score_volumes(folder, splits.test, splits.classes)
    assert [row["case"] for row in scores.rows] == list(splits.test.volumes) == list(dict.fromkeys(splits.test.patients))
    assert {row["unit"] for row in scores.rows} == {"mm"}
    for row in scores.rows:
        whole = splits.test.native(row["case"])
        pred = read_volume(folder, whole["cases"], whole["label"].shape)
        assert pred.shape == whole["label"].shape == (8, 64, 72) and pred.dtype == np.uint8
        assert row["dice"] == pytest.approx(dice(pred[None], whole["label"][None], 2).item())
        assert row["hd95"] == hd95(pred == 1, whole["label"] == 1, whole["spacing"])
    again = score_volumes(folder, splits.origin().test, splits.classes)
    assert again.rows == scores.rows, "the files alone decide"


def test_a_lower_threshold_finds_more(twins, tmp_path):
    splits = data.load("phantom:chaos", twins, size=48)
    folder = store_predictions(Bright(), splits.test, tmp_path / "stored", "0", splits.sha256)
    found = [score_volumes(folder, splits.test, splits.classes, ["dice"], threshold=t).rows[0] for t in (.4, .5, .6)]
    positives = [row["tp"] + row["fp"] for row in found]
    assert positives[0] > positives[1] > positives[2]
    (folder / f"{splits.test.cases[0]}.png").unlink()
    with pytest.raises(FileNotFoundError, match="no stored prediction .*store_predictions"):
        score_volumes(folder, splits.test, splits.classes)


def test_papers_score_volumes(twins, tmp_path):
    class Stored:
        path = tmp_path
    splits = data.load("phantom:chaos", twins, size=48)
    store_predictions(Bright(), splits.test, tmp_path / "predictions/chaos", "0", splits.sha256)
    rows = stored_scores(dict(bright=Stored()), dict(chaos=splits), ("dice", "assd"), score_volumes)
    assert [(r["case"], r["patient"], r["metric"]) for r in rows] == [(p, p, m) for p in splits.test.volumes for m in ("dice", "assd")]
    slices = stored_scores(dict(bright=Stored()), dict(chaos=splits), ("dice",))
    assert [r["case"] for r in slices] == list(splits.test.cases)
