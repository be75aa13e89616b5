"""What the benchmarks share: interleaved timing, provenance, tables."""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from medkd.trainers.fit import cpu_name, git_state, versions  # noqa: E402


def clock():
    """Seconds: of the processor with one thread, so that other processes do not count; of the wall
    with several, where threads that wait would count."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleaved(functions, rounds, repeats=None):
    """name -> smallest time in seconds over `rounds` rounds in which all take turns; a function
    named in `repeats` runs so often in each. One round to warm up is not counted."""
    times = dict.fromkeys(functions, np.inf)
    for number in range(rounds + 1):
        for name, function in functions.items():
            for _ in range((repeats or {}).get(name, 1) if number else 1):
                start = clock()
                function()
                taken = clock() - start
                if number:
                    times[name] = min(times[name], taken)
    return times


def smooth_noise(batch, size, cells, rng):
    "(batch,*size) noise that is interpolated between `cells` points per axis."
    coarse = torch.randn(batch, 1, *(cells,) * len(size), generator=rng)
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return F.interpolate(coarse, size=tuple(size), mode=mode, align_corners=True)[:, 0]


def blobs(batch, size, classes, seed=0):
    """image (batch,1,*size), label (batch,*size): smooth blobs on a jittered grid, every class in
    every image."""
    rng = torch.Generator().manual_seed(seed)
    count = max(classes - 1, 4)
    per_axis = int(np.ceil(count ** (1 / len(size)) - 1e-9))
    axes = torch.meshgrid(*(torch.linspace(0, per_axis, s) for s in size), indexing="ij")
    cells = np.stack(np.unravel_index(np.arange(per_axis ** len(size)), (per_axis,) * len(size)), 1)
    label = torch.zeros(batch, *size, dtype=torch.long)
    bend = .15 * smooth_noise(batch, size, 3 * per_axis, rng)
    for b in range(batch):
        chosen = torch.randperm(len(cells), generator=rng)[:count]
        for i, cell in enumerate(cells[chosen.numpy()]):
            centre = torch.from_numpy(cell) + .4 + .2 * torch.rand(len(size), generator=rng)
            away = sum((axis - c) ** 2 for axis, c in zip(axes, centre)).sqrt()
            label[b][away + bend[b] < .38] = 1 + i % (classes - 1)
    for b in range(batch):
        there = label[b].unique().tolist()
        assert there == list(range(classes)), f"image {b} has the classes {there} of {classes}"
    image = label / classes + .1 * smooth_noise(batch, size, 4 * per_axis, rng)
    return image[:, None].float(), label


def provenance(quick):
    "What the numbers depend on, no folder of this machine among it."
    return dict(quick=quick, date=time.strftime("%Y-%m-%d", time.gmtime()), cpu=cpu_name(),
                cores=os.cpu_count(), load=round(os.getloadavg()[0], 1),
                threads=torch.get_num_threads(), git=git_state(ROOT), versions=versions())


def arguments(text):
    "The command line of a benchmark."
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer rounds")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    return parser.parse_args()


def markdown(rows):
    "Rows of dicts as one markdown table; what a row lacks stays empty."
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[show(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(value):
    "A number with the digits that can be trusted."
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value == 0 or .001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1e}"


def report(name, rows, verdicts, args, note=""):
    "Print the table and what came of the limits; write the json when asked."
    print(f"\n{markdown(rows)}\n")
    if note:
        print(note)
    for line in verdicts:
        print(line)
    if args.json:
        content = dict(benchmark=name, about=provenance(args.quick), note=note, rows=rows,
                       verdicts=verdicts)
        args.json.write_text(json.dumps(content, indent=1))
