"""What the trainer itself costs: its steps against a bare loop with the same parts.

python benchmarks/trainer.py [--quick] [--json PATH]

Both train the same student with the same teacher, losses, optimiser, schedule, patches and
precision from the same start, a step of one after a step of the other; their losses are asserted to
be equal. Reading the batch is left out. The times are medians over the steps. What a run pays once,
the wiring check and each checkpoint, is given apart.
"""
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from common import arguments, clock, report

from medkd.core import seed_everything
from medkd.data import load
from medkd.losses.at import AT, at
from medkd.losses.logits import KD, kd_kl
from medkd.losses.task import Seg, dice_ce
from medkd.models.zoo import build
from medkd.trainers import Recipe, Trainer, poly
from medkd.trainers.recipe import resolve_precision

LIMIT = .05  # share of a bare step, at most
WEIGHTS = dict(seg=1., kd=1., at=1000.)


def teacher(width):
    "A fixed FANet that counts as trained."
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return build("fanet", width=width)


teacher.loads_weights = True


class Timed(Trainer):
    "Runs `bare` on every batch, too, and notes what both took and lost."
    def advance(self, batch, came):
        start = clock()
        super().advance(batch, came)
        middle = clock()
        losses = self.bare(batch)
        self.seconds_of.append((middle - start, clock() - middle))
        self.losses_of.append((self.last, losses))

    def step(self, batch):
        row = super().step(batch)
        self.last = [*row["losses"].values()]
        return row


def recipe(splits, networks, steps, size, precision):
    "Student, teacher, losses and schedule of the GKD notebook."
    narrow, wide = networks
    return Recipe(data=splits, student=partial(build, "mobile_unet", width=narrow),
                  teacher=partial(teacher, wide), terms=(Seg, partial(KD, 4.), AT), weights=WEIGHTS,
                  steps=steps, lr=1e-3, schedule=poly, batch_size=size, precision=precision,
                  validate_every=10 ** 6)


def race(recipe):
    "Seconds and losses of every step, pairs (trainer, bare), and seconds of what is done once."
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        start = time.perf_counter()
        trainer = Timed(recipe, recipe.data, Path(folder), recipe.precision, save_every=1e6)
        once = {"build and wiring check s": time.perf_counter() - start}
        trainer.seconds_of, trainer.losses_of, trainer.bare = [], [], bare(recipe, trainer.places)
        trainer.fit()
        start = time.perf_counter()
        trainer.save()
        once["checkpoint s"] = time.perf_counter() - start
    return trainer.seconds_of, trainer.losses_of, once


def features(net, wanted):
    "A dict that holds the outputs of the modules `wanted` after each forward of `net`."
    kept = {}
    for name in wanted:
        net.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: kept.update({name: out}))
    return kept


def bare(recipe, places):
    "A function that makes one step of the same training, written by hand, and gives its losses."
    seed_everything(recipe.seed)
    teacher = recipe.teacher().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    student = recipe.student().to(memory_format=torch.channels_last)
    taught, learnt = features(teacher, ("enc3", "dec3.up")), features(student, ("enc2", "dec2"))
    optimiser = recipe.optimiser(student.parameters(), lr=recipe.lr)
    decay = partial(recipe.schedule, epochs=recipe.steps / places.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: decay(n / places.steps))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=recipe.precision == "bf16")

    def step(batch):
        with torch.no_grad(), autocast():
            target = teacher(batch["image"]).float()
        with autocast():
            out = student(batch["image"]).float()
        pairs = (learnt["enc2"], taught["enc3"]), (learnt["dec2"], taught["dec3.up"])
        losses = dice_ce(out, batch["label"]), kd_kl(out, target, 4.), sum(at(*p) for p in pairs)
        sum(weight * loss for weight, loss in zip(WEIGHTS.values(), losses)).backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        return [loss.item() for loss in losses]
    return step


def measure(name, networks, size, batch, steps, precision):
    "One row of the table."
    splits = load("phantom:chasedb1", patch=size)
    splits = replace(splits, val=type(splits.val)((), ()))
    seconds, losses, once = race(recipe(splits, networks, steps, batch, precision))
    for number, (mine, plain) in enumerate(losses):
        np.testing.assert_allclose(mine, plain, rtol=1e-4, err_msg=f"{name}, step {number}")
    ours, theirs = np.median(seconds[2:], axis=0)
    share = float(ours / theirs - 1)
    return {"case": name, "precision": precision, "batch": f"{batch}x1x{size}x{size}",
            "trainer steps/s": float(1 / ours), "bare steps/s": float(1 / theirs),
            "more ms per step": float(1000 * (ours - theirs)), "share": share, "limit": LIMIT,
            "": "met" if share <= LIMIT else "NOT MET"} | once


def main():
    args = arguments(__doc__)
    steps, auto = 30 if args.quick else 200, resolve_precision("auto", "cpu")
    rows = [measure("very small", (.25, .125), 64, 4, steps, "fp32")]
    if not args.quick:
        rows += [measure("quick preset of GKD", (.5, .25), 128, 8, 20, precision)
                 for precision in dict.fromkeys(("fp32", auto))]
    verdicts = [f"{row['case']}, {row['precision']}: {row['share']:+.3f} of a bare step, wanted at "
                f"most {LIMIT}: {row['']}" for row in rows]
    report("trainer", rows, verdicts, args, "FANet -> Mobile U-Net, Seg + KD + AT, patches of "
           "phantom:chasedb1, no workers.")


if __name__ == "__main__":
    main()
