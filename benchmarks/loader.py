"""Throughput of the training loader against plain data sets.

python benchmarks/loader.py [--quick] [--json PATH]

Patches of the phantom twin of CHASEDB1, in batches, read to the end and thrown away. Three data
sets give the same patches for the same draws, which is asserted: ours behind the training loader; a
plain one over arrays in memory behind a plain DataLoader; a plain one that decodes the files and
equalises the contrast for every patch. `bare crop` cuts somewhere: it neither looks for vessels nor
augments. The best of several interleaved rounds on the wall's clock, the start of workers left out.
"""
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import arguments, report

from medkd.data import find, load
from medkd.data.patches import as_item, augment
from medkd.data.vessel_files import CHASEDB1, decode
from medkd.data.vessels import green_clahe
from medkd.trainers.loader import Places, training_loader

NAME, BATCH, WORKERS = "phantom:chasedb1", 8, (0, 2)


class Plain(Dataset):
    "Patches, index by index; `read` gives the arrays of a case."
    def __init__(self, patches, read):
        self.patches, self.read = patches, read

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        return self.draw(index, np.random.default_rng([0, 0, index]))

    def draw(self, index, rng):
        case = index % len(self.patches.cases)
        rows, columns = self.patches.window(case, rng)
        arrays = self.read(case)
        cut = {name: array[rows, columns] for name, array in arrays.items()}
        return as_item(self.patches.cases[case], **augment(rng, **cut))


class BareCrop(Plain):
    def draw(self, index, rng):
        case, side = index % len(self.patches.cases), self.patches.patch
        arrays = self.read(case)
        top, left = rng.integers(0, np.subtract(arrays["label"].shape, side) + 1)
        cut = {name: array[top:top + side, left:left + side] for name, array in arrays.items()}
        return as_item(self.patches.cases[case], **cut)


class FromFiles:
    "Arrays of a case, made from its files whenever they are asked for."
    def __init__(self, patches, folder):
        self.patches, self.folder = patches, folder

    def __call__(self, case):
        files = CHASEDB1.files(self.patches.cases[case])
        image = decode(self.folder / files["image"], "RGB")
        label = decode(self.folder / files["label"], "L")
        return dict(image=green_clahe(image), label=(label > 127).astype(np.uint8),
                    fov=self.patches.arrays[case]["fov"])


class FromArrays:
    "Arrays of a case that are in memory."
    def __init__(self, patches):
        self.patches = patches

    def __call__(self, case):
        return self.patches.arrays[case]


def plain_loader(data, batches, workers):
    "A DataLoader as anybody writes it, `batches` long."
    order = np.arange(batches * BATCH) % len(data)
    return DataLoader(data, BATCH, num_workers=workers, sampler=order)


def contestants(patches, folder):
    "name -> (batches, workers) -> loader; how much fewer batches the slow one gets."
    files, arrays = Plain(patches, FromFiles(patches, folder)), Plain(patches, FromArrays(patches))
    bare = BareCrop(patches, FromArrays(patches))
    check_same(patches, [files, arrays])
    return {
        "ours": (lambda n, w: training_loader(Places(patches, BATCH, 0, 0, n), w), 1),
        "arrays": (lambda n, w: plain_loader(arrays, n, w), 1),
        "bare crop": (lambda n, w: plain_loader(bare, n, w), 1),
        "files": (lambda n, w: plain_loader(files, n, w), 20),
    }


def check_same(patches, others):
    "AssertionError unless all give the same patches for the same draws."
    for index in range(len(patches.cases)):
        mine = patches.sample(index, np.random.default_rng([0, 0, index]))
        for other in others:
            for name, value in other[index].items():
                same = torch.equal if torch.is_tensor(value) else str.__eq__
                assert same(value, mine[name]), f"{name} of patch {index} differs"


def throughput(loader):
    "Images per second after the first batch."
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    images = sum(len(batch["image"]) for batch in batches)
    return images / (time.perf_counter() - start)


def measure(quick):
    "One row for each number of workers."
    _, folder, _ = find(NAME, None)
    patches, rows = load(NAME).train, []
    loaders = contestants(patches, folder)
    assert {int(v) for v in patches[0]["label"].unique()} == {0, 1}, "a patch without vessels"
    for workers in WORKERS:
        best = dict.fromkeys(loaders, 0.)
        for _ in range(2 if quick else 5):
            for name, (make, slower) in loaders.items():
                batches = 2 + (100 if quick else 400) // slower
                best[name] = max(best[name], throughput(make(batches, workers)))
        rates = {f"{name} images/s": rate for name, rate in best.items()}
        ratios = {f"ours / {name}": best["ours"] / best[name] for name in best if name != "ours"}
        rows.append(dict(workers=workers) | rates | ratios)
    return rows


def main():
    args = arguments(__doc__)
    rows = measure(args.quick)
    report("loader", rows, [], args,
           f"{NAME}: patches of 128x128 from images of 308x320, batches of {BATCH}.")


if __name__ == "__main__":
    main()
