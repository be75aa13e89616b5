"""Surface distances against MONAI's and MedPy's.

python benchmarks/metrics.py [--quick] [--json PATH]

Each row is one pair of smooth masks. The time of a function is the smallest of several interleaved
rounds in this process; a ratio is another library's time over ours. `difference` is the largest
absolute difference of any value to theirs, in mm (NSD: a share).
"""
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from common import arguments, report

from medkd.metrics import dice, hd95, surface_scores

CASES = {  # name: image shape, spacing in mm, shape of the structure, disagreement
    "hippocampus": ((35, 50, 35), (1., 1., 1.), (28, 40, 28), .05),
    "organ": ((160, 320, 320), (2., .8, .8), (140, 280, 280), .03),
    "organ, poor prediction": ((160, 320, 320), (2., .8, .8), (140, 280, 280), .12),
    "small in a large image": ((160, 512, 512), (2., .8, .8), (24, 48, 40), .05),
}
NAMES = ("hd95", "assd", "nsd")
LONG = ("organ, poor prediction", "small in a large image")  # without MedPy under --quick
TARGETS = {"hd95 / MONAI": 2, "hd95 / MedPy": 5, "all / MONAI": 5}


def smooth_noise(shape, cells, generator):
    "Noise interpolated between `cells` points per axis."
    coarse = torch.randn(1, 1, *(cells,) * len(shape), generator=generator)
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return F.interpolate(coarse, size=shape, mode=mode, align_corners=True)[0, 0].numpy()


def blob_pair(shape, structure, disagreement, seed=0):
    "A smooth structure in the image's middle and a prediction of it, as boolean arrays."
    generator = torch.Generator().manual_seed(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, s) for s in structure), indexing="ij", sparse=True)
    truth = np.sqrt(sum(a**2 for a in axes)) + .12 * smooth_noise(structure, 10, generator)
    wrong = truth + disagreement * smooth_noise(structure, 16, generator)
    place = tuple(slice((s - n) // 2, (s - n) // 2 + n) for s, n in zip(shape, structure))
    masks = []
    for field in (wrong, truth):
        masks.append(np.zeros(shape, bool))
        masks[-1][place] = field < .8
    assert all(mask.any() and not mask.all() for mask in masks), "an empty mask: nothing to measure"
    assert (masks[0] & masks[1]).any() and (masks[0] != masks[1]).any(), "equal or apart"
    return masks


def contestants(pred, label, spacing):
    "name -> function of nothing that gives its values."
    from medpy.metric import binary as medpy
    from monai import metrics as monai
    one_hot = [torch.from_numpy(mask)[None, None] for mask in (pred, label)]
    mm = dict(include_background=True, spacing=spacing)
    monai_hd95 = lambda: [monai.compute_hausdorff_distance(*one_hot, percentile=95, **mm).item()]
    average = monai.compute_average_surface_distance
    monai_assd = lambda: [average(*one_hot, symmetric=True, **mm).item()]
    monai_nsd = lambda: [monai.compute_surface_dice(*one_hot, [1.], **mm).item()]
    return {
        "ours hd95": lambda: [hd95(pred, label, spacing)],
        "ours all": lambda: [*map(surface_scores(pred, label, spacing).get, NAMES)],
        "ours pooled": lambda: [hd95(pred, label, spacing, definition="pooled")],
        "MONAI hd95": monai_hd95,
        "MONAI all": lambda: monai_hd95() + monai_assd() + monai_nsd(),
        "MedPy hd95": lambda: [medpy.hd95(pred, label, spacing)],
    }


def interleaved(functions, rounds, once=()):
    "name -> smallest time in seconds, name -> values; those named in `once` run only once."
    times, values = {}, {}
    for number in range(rounds):
        for name, function in functions.items():
            if number and name in once:
                continue
            start = time.perf_counter()
            values[name] = function()
            times[name] = min(times.get(name, np.inf), time.perf_counter() - start)
    return times, values


def measure(name, quick):
    "One row of the table."
    shape, spacing, structure, disagreement = CASES[name]
    pred, label = blob_pair(shape, structure, disagreement)
    large = pred.size > 1e6
    rounds = (2 if quick else 5) if large else 30
    functions = contestants(pred, label, spacing)
    if quick and name in LONG:
        del functions["MedPy hd95"]
    times, values = interleaved(functions, rounds, once=("MedPy hd95",) if large else ())
    pairs = [("ours all", "MONAI all"), ("ours hd95", "MONAI hd95"), ("ours pooled", "MedPy hd95")]
    worst = max(abs(a - b) for ours, theirs in pairs if theirs in values
                for a, b in zip(values[ours], values[theirs]))
    overlap = dice(torch.from_numpy(pred)[None], torch.from_numpy(label)[None], 2).item()
    assert worst < 1e-4, f"{name}: values differ by {worst}"
    row = {
        "case": name, "shape": "x".join(map(str, shape)),
        "dice": overlap, "hd95 mm": values["ours hd95"][0],
        **{f"{who} ms": 1000 * times[who] for who in times if who != "ours pooled"},
        "hd95 / MONAI": times["MONAI hd95"] / times["ours hd95"],
        "all / MONAI": times["MONAI all"] / times["ours all"],
        "difference": worst,
    }
    if "MedPy hd95" in times:
        row["hd95 / MedPy"] = times["MedPy hd95"] / times["ours pooled"]
    return row


def main():
    args = arguments(__doc__)
    warnings.simplefilter("ignore", FutureWarning)  # MONAI's own
    rows = [measure(name, args.quick) for name in CASES]
    verdicts = []
    for name, target in TARGETS.items():
        worst = min(row[name] for row in rows if name in row)
        verdict = "met" if worst >= target else "NOT MET"
        verdicts.append(f"{name}: at least {worst:.1f}, wanted {target}: {verdict}")
    report("metrics", rows, verdicts, args)


if __name__ == "__main__":
    main()
