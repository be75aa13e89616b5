"""3-D data: loading, patches and sliding windows against what they stand on.

python benchmarks/volumes.py [--quick] [--json PATH]

Load: all hippocampi of the Decathlon (the phantom twin where MEDKD_DATA has none), prepared for the
first time and again, against unpacking their files and against reading them with nibabel. Patches:
ours against MONAI's chain with the same changes, both from memory. Predict: labels slab by slab against MONAI's
sliding window and argmax, which are equal; the peak is that of torch's allocations.
"""
import gzip
import os
import shutil
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from common import arguments, clock, interleaved, report

from medkd.data import find, load
from medkd.data.pipelines import CT, changes
from medkd.slabs import predict_labels

NAME = "msd"


def source():
    "Name of the hippocampi that are here, and their folder."
    for name in (NAME, f"phantom:{NAME}"):
        try:
            return name, find(name, None)[1]
        except FileNotFoundError:
            continue
    raise AssertionError("a twin is always there")


def taken(function):
    "Seconds of one call."
    start = clock()
    function()
    return clock() - start


def load_rows(rounds):
    "Seconds of a first and a second load; shares of reading the files."
    name, folder = source()
    files, own = sorted(folder.glob("*Tr/[!.]*.nii.gz")), os.environ.get("MEDKD_CACHE")
    best = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            if name.startswith("phantom"):
                shutil.copytree(folder, Path(cache, "twin", folder.name))
            root = Path(cache, "twin") if name.startswith("phantom") else None
            os.environ["MEDKD_CACHE"] = cache
            calls = {
                "unpack": lambda: [gzip.decompress(path.read_bytes()) for path in files],
                "nibabel": lambda: [np.asarray(nibabel.load(path).dataobj) for path in files],
                "first": lambda: load(name, root), "again": lambda: load(name, root)}
            for key, call in calls.items():
                best[key] = min(best.get(key, np.inf), taken(call))
    os.environ.pop("MEDKD_CACHE")
    if own is not None:
        os.environ["MEDKD_CACHE"] = own
    return [dict(part=f"load {name}", files=len(files), **{f"{key} s": best[key] for key in best},
                 ratio=best["first"] / best["nibabel"], to="nibabel's reading")]


def volume(size, classes, seed=0):
    "A body with organs in it, on the network's grid."
    rng = np.random.default_rng(seed)
    image = rng.random((1, *size), dtype=np.float32)
    image[:, :size[0] // 4] = 0
    label = np.zeros(size, np.uint8)
    for k in range(1, classes):
        corner = [rng.integers(n // 4, n - n // 6) for n in size]
        label[tuple(slice(c, c + n // 8) for c, n in zip(corner, size))] = k
    assert set(np.unique(label)) == set(range(classes))
    return image, label


def patch_rows(size, patch, rounds):
    "Milliseconds of a patch."
    from monai.transforms import Compose, RandCropByPosNegLabeld
    image, label = volume(size, 5)
    arrays = dict(image=image, label=label, foreground=np.flatnonzero(label).astype(np.int32))
    item = dict(image=torch.from_numpy(image), label=torch.from_numpy(label[None]))
    chain = Compose([RandCropByPosNegLabeld(("image", "label"), "label", patch, 1, 1, 4, "image", 0),
                     changes(3, .2, .2, .1)])
    rng = np.random.default_rng(0)
    times = interleaved({"ours": lambda: [CT().patch(arrays, patch, rng) for _ in range(4)],
                         "monai": lambda: chain(item)}, rounds)
    return [dict(part=f"patch {patch} of {size}", **{f"{key} ms": 250 * s for key, s in times.items()},
                 ratio=times["ours"] / times["monai"], to="MONAI's chain")]


def peak(function):
    "MiB that torch holds at most during the call."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as prof:
        function()
    events = prof.profiler.kineto_results.events()
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())
                      if e.name() == "[memory]"])
    return float(held.max()) / 2 ** 20


def predict_rows(size, tile, classes, rounds):
    "MiB and seconds of the labels of a volume."
    from monai.inferers import sliding_window_inference
    net, image = torch.nn.Conv3d(1, classes, 3, padding=1), torch.from_numpy(volume(size, 5)[0])[None]

    def slabs():
        return predict_labels(net, image, tile, .5, 1)[0]

    def whole():
        with torch.no_grad():
            return sliding_window_inference(image, tile, 1, net, .5, mode="gaussian")[0].argmax(0)
    assert (slabs() == whole()).float().mean() > .9999
    times = interleaved(dict(slabs=slabs, whole=whole), rounds)
    mib = dict(slabs=peak(slabs), whole=peak(whole))
    return [dict(part=f"predict {size}, tile {tile}, {classes} classes",
                 **{f"{key} s": s for key, s in times.items()}, **{f"{key} MiB": m for key, m in mib.items()},
                 ratio=mib["slabs"] / mib["whole"], to="memory of MONAI's sliding window")]


def measure(quick):
    "All rows."
    rounds = 1 if quick else 3
    rows = load_rows(rounds)
    rows += patch_rows(*(((64,) * 3, (32,) * 3) if quick else ((200, 180, 160), (96,) * 3)), rounds)
    length = 96 if quick else 256
    return rows + predict_rows((length, 48, 48), (32, 32, 32), 14, rounds)


def main():
    args = arguments(__doc__)
    report("volumes", measure(args.quick), [], args, "Ratios: ours to what `to` says.")


if __name__ == "__main__":
    main()
