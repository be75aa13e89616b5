"""The slice maker against a plain read of the same files.

python benchmarks/slices.py [--quick] [--json PATH]

Copies of a phantom case of KiTS19, as large as a small real one, are cut into an empty folder with
nothing remembered of them: checksums, unpacking, turning, checks, writing and reading back. `nibabel`
unpacks and reads the arrays of all files, one by one. Seconds of the wall's clock, the smallest of several
interleaved rounds.
"""
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import nibabel
import numpy as np

from common import arguments, report

from medkd.data.cut import make_slices
from medkd.data.kits import write_kits19

RATIO = "of nibabel's time"


def cases(folder, size, count):
    "A KiTS19 folder with `count` copies of one case; its files."
    write_kits19(folder, ["case_00000"], size, seed=0)
    (folder / "PHANTOM").unlink(missing_ok=True)
    for number in range(1, count): shutil.copytree(folder / "case_00000", folder / f"case_{number:05d}")
    return sorted(folder.glob("*/*.nii.gz"))


def read(files):
    "The array of each as nibabel gives it."
    for path in files: np.asanyarray(nibabel.load(path).dataobj)


def cut(folder, size, workers):
    "All cases into a new folder, with a new cache: nothing is remembered."
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        os.environ["MEDKD_CACHE"] = scratch
        made = make_slices(folder, Path(scratch, "out"), "kits19", size=size, workers=workers)
    assert made["cut"] == made["cases"] > 0


def measure(size, count, rounds):
    "Rows of the table."
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "data")
        files = cases(folder, size, count)
        packed = sum(path.stat().st_size for path in files) / 1e6
        runs = {"nibabel": partial(read, files),
                "slice maker, a case at a time": partial(cut, folder, size[1], 1),
                "slice maker, a case per core": partial(cut, folder, size[1], 0)}
        times = dict.fromkeys(runs, np.inf)
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name] = min(times[name], time.perf_counter() - start)
    shape = f"{count} x {'x'.join(map(str, size))}"
    return [{"cases": shape, "what": name, "s": taken, "packed MB/s": packed / taken, RATIO: taken / times["nibabel"]}
            for name, taken in times.items()]


def main():
    args = arguments(__doc__)
    rows = measure((6, 64, 64), 2, 1) if args.quick else measure((60, 512, 512), 4, 7)
    share, cores = 1 / rows[1][RATIO], os.cpu_count()
    verdicts = [f"a case at a time, {share:.2f} of the slice maker's time is what nibabel takes to unpack and read",
                f"a case per core ({min(4, cores)} of {cores}), it takes {rows[2][RATIO]:.2f} of nibabel's time"]
    report("slices", rows, [] if args.quick else verdicts, args)


if __name__ == "__main__":
    main()
