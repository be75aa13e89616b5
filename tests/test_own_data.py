"""One's own networks and data, as the start page shows: no class of medkd in either, layers tapped by their module names."""
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from medkd.data.base import Splits
from medkd.inference import score_predictions, store_predictions
from medkd.losses.at import AT
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.papers import predict_all, stored_scores
from medkd.trainers import Recipe, Run, fit


class Blobs(Dataset):
    "Smooth blobs under noise."
    def __init__(self, n, seed, **changes):
        rng = torch.Generator().manual_seed(seed)
        self.label = (F.avg_pool2d(torch.randn(n, 1, 32, 32, generator=rng), 9, 1, 4)[:, 0] > 0).long()
        self.image = self.label[:, None] + .5 * torch.randn(n, 1, 32, 32, generator=rng)
        self.seed, self.changes = seed, changes

    def __len__(self): return len(self.label)

    def __getitem__(self, i):
        item = dict(image=self.image[i], label=self.label[i], case=f"{self.seed}-{i}")
        return item | {key: change(item) for key, change in self.changes.items()}


class Twice(nn.Module):
    "Two convolutions."
    def __init__(self, ins, outs):
        super().__init__()
        self.first, self.second = nn.Conv2d(ins, outs, 3, padding=1), nn.Conv2d(outs, outs, 3, padding=1)
        self.norm = nn.GroupNorm(1, outs)

    def forward(self, x): return F.relu(self.norm(self.second(F.relu(self.first(x)))))


class Net(nn.Module):
    "Half the size and back."
    def __init__(self, width):
        super().__init__()
        self.down, self.middle = Twice(1, width), nn.ModuleDict(dict(deep=Twice(width, 2 * width)))
        self.up, self.out = Twice(3 * width, width), nn.Conv2d(width, 2, 1)

    def forward(self, x):
        fine = self.down(x)
        deep = self.middle["deep"](F.max_pool2d(fine, 2))
        return self.out(self.up(torch.cat([fine, F.interpolate(deep, scale_factor=2)], 1)))


train_set, val_set, test_set = Blobs(16, 0), Blobs(4, 1), Blobs(6, 2)


def test_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Splits("mine", train_set, val_set, test_set, classes=("background", "blob"))
    alone = Recipe(data=data, student=partial(Net, 8), terms=(Seg,), weights=dict(seg=1), steps=30, lr=1e-2)
    teacher = fit(alone, "runs/teacher")
    taps = ["middle.deep", "up.second"]
    student = fit(replace(alone, student=partial(Net, 4), teacher=teacher, terms=(Seg, KD, partial(AT, taps)),
                          weights=dict(seg=1, kd=1, at=100)), "runs/student")
    stored = store_predictions(student.network(), test_set, student.path/"predictions", student.sha256, data.sha256)
    scores = score_predictions(stored, test_set, data.classes)
    assert [row["case"] for row in scores.rows] == [f"2-{i}" for i in range(6)]
    assert all(row["dice"] > .8 for row in scores.rows)
    assert {"seg", "kd", "at"} == set(student.metrics("train")[0]["losses"])


def splits(**changes): return Splits("mine", Blobs(4, 0, **changes), Blobs(1, 1), Blobs(1, 2), ("background", "blob"))


one_step = Recipe(data=None, student=partial(Net, 2), terms=(Seg,), weights=dict(seg=1), steps=1, batch_size=2)


@pytest.mark.parametrize("changes, expected", [
    (dict(image=lambda item: item["image"].double()), r"train\[0\]: image is torch.float64; expected a torch.float32 tensor"),
    (dict(image=lambda item: item["image"].byte()), "image is torch.uint8"),
    (dict(image=lambda item: item["image"].numpy()), "image is float32; expected a torch.float32 tensor"),
    (dict(image=lambda item: item["image"][0]), r"shape \(32, 32\); expected \(C,\*S\), channels first"),
    (dict(label=lambda item: item["label"].byte()), "label is torch.uint8; expected a torch.int64 tensor"),
    (dict(label=lambda item: item["label"][None]), r"shape \(1, 32, 32\); expected \(32, 32\)"),
    (dict(label=lambda item: item["label"][:, :16]), r"shape \(32, 16\); expected \(32, 32\)"),
    (dict(label=lambda item: item["label"] * 255), "label holds 0, 255; expected 0 to 1"),
    (dict(label=lambda item: item["label"] - 1), "label holds -1, 0; expected 0 to 1"),
])
def test_faulty_item_is_named(changes, expected):
    with pytest.raises(ValueError, match=expected): splits(**changes)


def test_items_that_are_no_dicts():
    pairs = [(item["image"], item["label"]) for item in map(train_set.__getitem__, range(4))]
    with pytest.raises(ValueError, match=r"val\[0\]: it is a tuple; expected a dict with image, label and case"):
        Splits("mine", train_set, pairs, [], ("background", "blob"))
    with pytest.raises(ValueError, match=r"train\[0\]: it has no case, only image, label"):
        Splits("mine", [dict(image=image, label=label) for image, label in pairs], [], [], ("background", "blob"))


def test_other_items_are_other_data():
    sums = [splits(**changes).sha256 for changes in (
        {}, dict(image=lambda item: item["image"] + 1e-6), dict(label=lambda item: 1 - item["label"]),
        dict(case=lambda item: "x" + item["case"]), dict(spacing=lambda item: (1., 1.)), dict(spacing=lambda item: (1., 2.)))]
    assert len(set(sums)) == len(sums)
    mine = splits()
    for changed in (dict(test=Blobs(1, 3)), dict(val=Blobs(1, 3)), dict(classes=("background", "lesion")), dict(patch=(16, 16))):
        assert replace(mine, sha256="", **changed).sha256 != mine.sha256
    assert replace(mine, sha256="given").sha256 == "given"


def test_checksum_is_that_of_another_process():
    code = "import test_own_data; print(test_own_data.splits().sha256)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | dict(PYTHONHASHSEED="7"))
    assert done.stdout.strip() == splits().sha256


def test_random_transforms_keep_the_run(tmp_path):
    noisy = dict(image=lambda item: item["image"] + .1 * torch.randn(1, 32, 32))
    first = fit(replace(one_step, data=splits(**noisy)), tmp_path/"run")
    torch.rand(7)
    assert fit(replace(one_step, data=splits(**noisy)), tmp_path/"run").path == first.path
    assert fit(replace(one_step, data=splits()), tmp_path/"run").path != first.path


def test_other_test_images_are_predicted_anew(tmp_path):
    net = Net(2).eval()
    for data in (splits(), replace(splits(), test=Blobs(1, 3), sha256="")):
        folder = store_predictions(net, data.test, tmp_path, "weights", data.sha256)
        case, = (path.stem for path in folder.glob("*.png") if path.stem == data.test[0]["case"])
        assert score_predictions(folder, data.test, data.classes).rows[0]["case"] == case


def test_run_is_opened_again_elsewhere(tmp_path):
    run = fit(replace(one_step, data=splits()), tmp_path/"run")
    with pytest.raises(PermissionError, match=r"test_own_data:Net.*allow="): Run(run.path).network()
    assert isinstance(Run(run.path, allow=("test_own_data",)).network(), Net)


def test_scores_from_own_data(tmp_path):
    run = fit(Recipe(data=splits(), student=partial(Net, 4), terms=(Seg,), weights=dict(seg=1), steps=1), tmp_path/"run")
    predict_all(dict(student=run), dict(mine=splits()))
    rows = stored_scores(dict(student=run), dict(mine=splits()), ("dice",))
    assert [row["case"] for row in rows] == ["2-0"]


@pytest.mark.parametrize("changes, error, expected", [
    (dict(terms=(Seg, KD), weights=dict(seg=1, kd=1)), KeyError, "asked of a teacher, and there is none"),
    (dict(student=partial(nn.Conv2d, 1, 3, 1)), ValueError, "3 channels, mine has 2 classes"),
    (dict(terms=(Seg, AT), weights=dict(seg=1, at=1), teacher=Net(4)), KeyError, "no roles are known here"),
])
def test_what_does_not_fit_together(tmp_path, changes, error, expected):
    base = Recipe(data=splits(), student=partial(Net, 4), terms=(Seg,), weights=dict(seg=1), steps=1)
    with pytest.raises(error, match=expected): fit(replace(base, **changes), tmp_path/"run")
