"""Toy data, networks, terms and recipes that other processes can import, and runs in children."""
import hashlib
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401  (imported once, by the server that forks the children)
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn

from medkd.core import Term, freeze, gather_rows, resize, weights_sha256
from medkd.data.base import Splits
from medkd.losses.at import AT
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.trainers import Adversary, Recipe, Trainer, fit
from medkd.trainers.checkpoint import read_checkpoint


# data
class Squares:
    "A bright square on noise."
    def __init__(self, n, seed, size=16, bad=()):
        rng = torch.Generator().manual_seed(seed)
        self.seed, self.label = seed, torch.zeros(n, size, size, dtype=torch.long)
        for i, (y, x) in enumerate(torch.randint(0, size // 2, (n, 2), generator=rng)):
            self.label[i, y:y + size // 2, x:x + size // 2] = 1
        self.image = self.label[:, None] + .5 * torch.randn(n, 1, size, size, generator=rng)
        for i in bad: self.image[i, 0, 0, 0] = torch.nan

    def __len__(self): return len(self.label)

    def __getitem__(self, i):
        return dict(image=self.image[i], label=self.label[i], case=f"case{self.seed}-{i}")


class Sampled(Squares):
    "Augmented from the generator it is given."
    def sample(self, i, rng):
        noise = torch.from_numpy(rng.standard_normal(self.image[i].shape)).float()
        return self[i] | dict(image=self.image[i] + .2 * noise)


class Careless(Squares):
    "Augmented from the global generators, all three of them."
    def __getitem__(self, i):
        scale = 1 + .1 * random.random() + .1 * np.random.rand()
        return super().__getitem__(i) | dict(image=scale * self.image[i] + .1 * torch.rand(1))


class Slow(Sampled):
    def sample(self, i, rng):
        time.sleep(.03)
        return super().sample(i, rng)


def squares(kind=Sampled, n=8, val=2, bad=(), size=16):
    text = f"{kind.__qualname__} {n} {val} {bad} {size}"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Splits("squares", kind(n, 0, size, bad), Squares(val, 1, size), Squares(2, 2, size),
                  ("background", "square"), sha256)


# networks
class Net(nn.Module):
    "Two convolutions down, two up, with the roles `encoder` and `decoder`."
    taps = dict(encoder="down", decoder="up")

    def __init__(self, width=4, dropout=0., norm=True, in_channels=1):
        super().__init__()
        def norm_of(c): return nn.BatchNorm2d(c) if norm else nn.Identity()
        self.down = nn.Sequential(nn.Conv2d(in_channels, width, 3, 2, 1), norm_of(width), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), norm_of(width), nn.ReLU())
        self.drop, self.head = nn.Dropout(dropout), nn.Conv2d(width, 2, 1)

    def encode(self, x): return dict(bottleneck=self.down(x))

    def decode(self, features): return self.head(self.drop(self.up(features["bottleneck"])))

    def forward(self, x): return self.decode(self.encode(x))


def teacher(seed=7, width=8):
    "A fixed network that counts as trained."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(width)


teacher.loads_weights = True


# terms
class Projected(Term):
    "Squared difference of encoders, through a projector that is made in `build`."
    names = ("projected",)

    def __init__(self, student="encoder"):
        super().__init__()
        self.needs = (student,), ("encoder",)

    def build(self, student_shapes, teacher_shapes):
        tap, = self.needs[0]
        self.projector = nn.Conv2d(student_shapes[tap][1], teacher_shapes["encoder"][1], 1)

    def forward(self, student, teacher, batch, active):
        mine = self.projector(student[self.needs[0][0]])
        return dict(projected=F.mse_loss(resize(mine, teacher["encoder"].shape[2:]),
                                         teacher["encoder"]))


class Queued(Term):
    "Distance to a queue of the teacher's pooled keys of all processes."
    names, needs = ("queued",), (("encoder",), ("encoder",))

    def build(self, student_shapes, teacher_shapes):
        channels = teacher_shapes["encoder"][1]
        self.embed = nn.Linear(student_shapes["encoder"][1], channels)
        self.register_buffer("queue", torch.zeros(12, channels))

    def forward(self, student, teacher, batch, active):
        mine = self.embed(student["encoder"].mean((2, 3)))
        loss = (mine[:, None] - self.queue.clone()[None]).square().mean()
        keys = gather_rows(teacher["encoder"].mean((2, 3)))
        with torch.no_grad(): self.queue.copy_(torch.cat([keys, self.queue])[:len(self.queue)])
        return dict(queued=loss)


class Assisted(Term):
    "Distance to what another run's network makes of the image."
    names = ("assisted",)

    def __init__(self, assistant):
        super().__init__()
        self.assistant = (freeze(assistant.network()),)

    def forward(self, student, teacher, batch, active):
        return dict(assisted=F.mse_loss(student["out"], self.assistant[0](batch["image"])))


class Drawn(Term):
    "Logits pulled to a random image, drawn from torch's, NumPy's and Python's generators."
    names = ("drawn",)

    def forward(self, student, teacher, batch, active):
        target = torch.rand_like(student["out"]) + np.random.rand() + random.random()
        return dict(drawn=F.mse_loss(student["out"], target))


class Judge(Adversary):
    "Tells the student's logits from the teacher's."
    needs = (("out",), ("out",))

    def __init__(self, norm=True, **options):
        super().__init__(**options)
        self.norm = norm

    def build(self, student_shapes, teacher_shapes):
        norm = nn.BatchNorm2d(4) if self.norm else nn.Identity()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 1, 3))

    def student(self, student, teacher, batch):
        return dict(adversarial=-self.net(student["out"]).mean())

    def forward(self, student, teacher, batch):
        real, fake = self.net(teacher["out"]), self.net(student["out"])
        return dict(judge=F.softplus(-real).mean() + F.softplus(fake).mean())


def from_second_step(epoch): return float(epoch > 0)


# recipes
alone = Recipe(data=squares, student=partial(Net, norm=False), terms=(Seg,), weights=dict(seg=1),
               epochs=4, batch_size=4, lr=1e-2, precision="fp32")
distil = replace(alone, teacher=teacher, terms=(Seg, KD, AT), weights=dict(seg=1, kd=1, at=10))
everything = replace(
    alone, student=partial(Net, dropout=.3), teacher=teacher, adversary=partial(Judge, lr=1e-3),
    terms=(Seg, KD, Projected, Queued, Drawn), clip=1.,
    weights=dict(seg=1, kd=.5, projected=.1, queued=.1, drawn=.01, adversarial=.01))


# runs
def outcome(folder):
    "What two runs are compared by: weights, the checkpoint without its time, the log."
    state = read_checkpoint(Path(folder)/"last.pt")
    return dict(best=(Path(folder)/"best.safetensors").read_bytes(),
                state=flat(state | dict(seconds=0)),
                log=(Path(folder)/"metrics.jsonl").read_bytes())


def flat(value):
    "Nested containers as text and bytes that compare by ==."
    if torch.is_tensor(value): return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict): return {str(k): flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def only_run(root):
    "The one run folder under `root`."
    folder, = (p.parent for p in Path(root).glob("*/params.json"))
    return folder


def in_child(target, *args, **kwargs):
    "Start target(*args, **kwargs) in a child that leads its own session; the process."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    process = context.Process(target=_lead, args=(target, args, kwargs))
    process.start()
    return process


def _lead(target, args, kwargs):
    os.setsid()
    multiprocessing.set_start_method("fork",
                                     force=True) # of DataLoader workers, as everywhere on Linux
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    target(*args, **kwargs)


def exit_code(process, seconds=60):
    process.join(seconds)
    assert not process.is_alive(), "the child did not end"
    return process.exitcode


def wait_for(condition, seconds=60):
    "What `condition()` gives as soon as that is true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(.02)
    raise TimeoutError(f"not within {seconds} s")


def train_and_die(recipe, root, where, count, when="before", **options):
    "`fit`, killed at call number `count` of the function with the dotted name `where`."
    die_at(where, count, when)
    fit(recipe, root, **options)


def die_at(where, count, when):
    "From its call number `count` on, the function ends this process like a power cut."
    import importlib
    module, _, name = where.rpartition(".")
    owner = Trainer if module == "Trainer" else importlib.import_module(module)
    original, calls = getattr(owner, name), []
    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and when == "before": os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == count and when == "after": os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, dying)


class Digests(Trainer):
    "Leaves what every rank ends with in `<folder>/rank<i>.json`."
    def finish(self):
        from medkd.files import write_json
        state = self.module.state_dict()
        queue = [k for k in state if k.endswith("queue")]
        write_json(self.folder/f"rank{self.rank}.json", dict(
            objective=weights_sha256(self.module),
            adversary=self.adversary and weights_sha256(self.adversary),
            keys=state[queue[0]].tolist() if queue else None))
        return super().finish()


class Losing(Trainer):
    "Its second process fails in the second step."
    def step(self, batch):
        if self.rank == 1 and self.step_number == 1:
            (self.folder/"raised").touch()
            raise OSError("rank 1 is lost")
        return super().step(batch)


# disturbances
def change(path, how): path.write_bytes(how(path.read_bytes()))


@contextmanager
def patched(owner, name, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try: yield original
    finally: setattr(owner, name, original)


@contextmanager
def stopping_after(step):
    "Training raises KeyboardInterrupt when `step` is done and saved."
    advance = Trainer.advance
    def stopping(self, batch, came):
        advance(self, batch, came)
        if self.step_number == step: raise KeyboardInterrupt
    with patched(Trainer, "advance", stopping): yield


@contextmanager
def interrupting_in_step(step):
    "SIGINT arrives while step number `step` (from 1) is computed."
    work = Trainer.work
    def interrupted(self, batch, active):
        if self.step_number == step - 1 and hasattr(self, "rows"):
            signal.raise_signal(signal.SIGINT)
        return work(self, batch, active)
    with patched(Trainer, "work", interrupted): yield


def loader_workers():
    "Children of this process that are no server of multiprocessing."
    def words(process):
        try: return " ".join(process.cmdline())
        except psutil.Error: return "server"
    return [p for p in psutil.Process().children()
            if not any(word in words(p) for word in ("forkserver", "resource_tracker", "server"))]
