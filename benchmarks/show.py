"""Panels: a move through a large volume, the memory it keeps, opening a data set, following a training.

python benchmarks/show.py [--quick] [--json PATH]

Slice: one move of a slider of the viewer, all three planes drawn and encoded. Memory: what 1,000 moves leave
behind, by Python's allocations and by the process. Open: the explorer of all hippocampi of the Decathlon (the
phantom twin where MEDKD_DATA has none) that were loaded before, with its first picture. Live: seconds of the
processor that the panel of a run takes each second while a step is logged every 20 ms, with a third of them read already.
"""
import gc
import json
import resource
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from common import arguments, clock, report
from volumes import source

from medkd.controls import figure_bytes
from medkd.data import load
from medkd.show import explore_data, live_panel, slice_viewer

LIMITS = dict(move=150, kept=1, opening=2, live=.01)


def scan(size, classes=4):
    "A volume with organs, and a prediction beside them."
    rng = np.random.default_rng(0)
    image = rng.random((1, *size), dtype=np.float32)
    label = np.zeros(size, np.int64)
    for k in range(1, classes):
        corner = [rng.integers(n // 6, n // 2) for n in size]
        label[tuple(slice(c, c + n // 4) for c, n in zip(corner, size))] = k
    assert set(np.unique(label)) == set(range(classes))
    item = dict(image=torch.from_numpy(image), label=torch.from_numpy(label), case="scan", spacing=(.8, .8, 2.))
    return item, np.roll(label, 5, 1), ("background", *(f"organ {k}" for k in range(1, classes)))


def slice_rows(size, moves, memory_moves):
    "Milliseconds of a move, the median and the slowest; MiB that many moves leave."
    item, found, classes = scan(size)
    viewer, rows = slice_viewer([item], dict(student={"scan": found}), classes), []

    def sweep(count):
        for k in range(count):
            control = [*viewer.slices.values()][k % 3]
            control.value = (control.value + 7) % (control.max + 1)
    sweep(6)
    times = []
    for k in range(moves):
        start = clock()
        sweep(1)
        times.append(1000 * (clock() - start))
    gc.collect()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    sweep(memory_moves)
    gc.collect()
    kept = (tracemalloc.get_traced_memory()[0] - before) / 2**20
    tracemalloc.stop()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - process) / 2**10
    rows.append(dict(part=f"move a slice of {size}", **{"median ms": float(np.median(times)), "slowest ms": max(times)}))
    return [*rows, dict(part=f"{memory_moves} moves", **{"kept MiB": kept, "peak grown by MiB": grown})]


def opening_row():
    "Seconds until the explorer stands there, matplotlib's import included."
    name, _ = source()
    splits = load(name)
    start = clock()
    explorer = explore_data(splits)
    figure_bytes(explorer.figure)
    seconds = clock() - start
    return dict(part=f"open {name}", cases=sum(len(part.cases) for part in (splits.train, splits.val, splits.test)), s=seconds)


def live_row(steps, seconds):
    "Part of one processor that the panel takes, over this time."
    folder = Path(tempfile.mkdtemp(), "run")
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(dict(recipe=dict(steps=3 * steps))))

    def lines(start, stop):
        rows = (dict(kind="train", step=k, epoch=k / 100, lr=.1, losses=dict(seg=1 / (k + 1), kd=.5, at=.01), weights=dict(seg=1, kd=1, at=10)) for k in range(start, stop))
        return "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines(0, steps))
    panel = live_panel(folder)
    used, start, done = 0., time.monotonic(), steps
    while (passed := time.monotonic() - start) < seconds:
        new = steps + int(passed * 50)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(lines(done, new))
        done, began = new, time.thread_time()
        panel.tick()
        took = time.thread_time() - began
        used += took
        time.sleep(max(1., 100 * took))
    passed = time.monotonic() - start
    return dict(part=f"follow a run of {done} steps", share=used / passed, **{"s of the processor": used})


def measure(quick):
    "All rows."
    size = (96, 160, 48) if quick else (512, 512, 160)
    rows = slice_rows(size, 12 if quick else 60, 60 if quick else 1000)
    return [*rows, opening_row(), live_row(500 if quick else 20000, 4 if quick else 60)]


def verdicts(rows):
    "Whether each number is within its limit."
    move, memory, opening, live = rows
    found = dict(move=move["median ms"], kept=memory["kept MiB"], opening=opening["s"], live=live["share"])
    return [f"{name} {found[name]:.3g}, limit {limit}: {'met' if found[name] <= limit else 'MISSED'}" for name, limit in LIMITS.items()]


def main():
    args = arguments(__doc__)
    rows = measure(args.quick)
    report("show", rows, verdicts(rows), args, "Milliseconds and seconds of the processor with one thread.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
