"""Share of the floor of a distilled step that each term takes.

python benchmarks/terms.py [--quick] [--json PATH]

The floor is the teacher's forward without gradients and the student's forward, backward and
optimiser step with a trivial loss, on the same images, in float32. A term's cost is its own forward
and its backward to detached copies of the taps of both networks. All take turns in one process; a
share is a ratio of the smallest times. `saved MiB` is what a term keeps between forward and
backward, taps apart; `peak MiB` the most it holds at a time, the gradients of the taps included.
"""
import importlib
import os
import pkgutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler talks otherwise
import torch  # noqa: E402
import torch.nn.functional as F
from torch.profiler import profile

from common import arguments, blobs, interleaved, report

import medkd.losses
from medkd.core import Taps, Tapped, Term, freeze
from medkd.losses import logits, skd, task
from medkd.models.zoo import build

LIMITS = dict(KD=.05, CWD=.05, DKD=.06, NKD=.06, DIST=.12, AT=.1, pairwise=.1, IFVD=.1, CIRKD=.3,
              GraphFlow=.1)  # shares of the floor; HLFD's is for its own networks: sikd_hlfd.py
UNFIT = KeyError, TypeError, ValueError, RuntimeError  # a term cannot run on these taps
BASIC_ROLES = dict(
    e1="conv_0", e2="down_1", e3="down_2", e4="down_3", e5="down_4", d5="upcat_4", d4="upcat_3",
    d3="upcat_2", d2="upcat_1", encoder="down_2", decoder="upcat_2", head_in="final_conv:in")


def basic_unet(first, classes):
    "MONAI's 3-D BasicUNet, whose first level has the images' size, with roles."
    from monai.networks.nets import BasicUNet
    channels = (first, first, 2 * first, 4 * first, 8 * first, first)
    with redirect_stdout(StringIO()):
        net = BasicUNet(3, 1, classes, channels)
    net.taps = BASIC_ROLES
    return net


@dataclass
class Setting:
    "Images, classes, and what makes the networks."
    shape: tuple
    classes: int
    teacher: partial
    student: partial
    networks: str


def gkd(shape, width):
    "FANet of a width teaches the published Mobile U-Net."
    teacher, student = partial(build, "fanet", 1, 2, width), partial(build, "mobile_unet", 1, 2)
    return Setting(shape, 2, teacher, student, f"FANet x{width:g} -> Mobile U-Net")


def settings(quick):
    "name -> Setting. The narrower a teacher, the lower the floor and the larger the shares."
    return {
        "GKD": gkd((8, 1, 128, 128), .125 if quick else 1.),
        "2-D": gkd((8, 1, 256, 256), .125 if quick else .25),
        "3-D": Setting((2, 1, 48, 48, 48), 14, partial(build, "resunet3d", 1, 14),
                       partial(build, "unet3d_tiny", 1, 14), "ResU-Net -> U-Net tiny"),
        "3-D, full size": Setting((2, 1, 48, 48, 48), 14, partial(basic_unet, 32, 14),
                                  partial(basic_unet, 16, 14),
                                  "MONAI BasicUNet 32..256 -> 16..128"),
    }


def term_classes():
    "Every Term defined in medkd.losses."
    names = [info.name for info in pkgutil.walk_packages(medkd.losses.__path__, "medkd.losses.")]
    modules = [importlib.import_module(name) for name in sorted(names)]
    classes = [value for module in modules for value in vars(module).values()
               if isinstance(value, type) and value.__module__ == module.__name__]
    return [cls for cls in classes if issubclass(cls, Term)]


def make_term(cls, setting):
    "A term with its defaults; one that has no defaults, as in its example."
    try:
        return cls()
    except TypeError:
        return cls.example(len(setting.shape) - 2, setting.classes)[0]


def fitting_terms(setting, student, teacher):
    "The terms whose taps both networks have; name -> what another one lacks."
    terms, lacking = [], {}
    for cls in term_classes():
        try:
            term = make_term(cls, setting)
            for net, names in zip((student, teacher), term.needs):
                Tapped(net, names)
            terms.append(term)
        except UNFIT as error:
            lacking[cls.__name__] = reason(error)
    return terms, lacking


def reason(error):
    "The first clause of an error."
    return str(error.args[0] if error.args else error).partition(";")[0].partition("\n")[0]


def tap_both(setting):
    "Both networks with the taps that some term needs, a batch, the terms and the ones left out."
    layout = torch.channels_last if len(setting.shape) == 4 else torch.preserve_format
    torch.manual_seed(0)
    teacher = setting.teacher().to(memory_format=layout)
    student = setting.student().to(memory_format=layout)
    image, label = blobs(setting.shape[0], setting.shape[2:], setting.classes)
    image = image.contiguous(memory_format=layout)
    terms, lacking = fitting_terms(setting, student, teacher)
    needs = [[name for term in terms for name in term.needs[side]] for side in (0, 1)]
    batch = dict(image=image, label=label, case=[f"case{i}" for i in range(len(image))])
    return Tapped(freeze(teacher), needs[1]), Tapped(student, needs[0]), batch, terms, lacking


def floor(teacher, student, image):
    "A function that does the least a distilled step can do; the learning rate is 0: it repeats."
    optimiser = torch.optim.AdamW(student.parameters(), lr=0.)

    def step():
        with torch.no_grad():
            teacher.net(image)
        student.net(image).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


def leaves(taps, wanted):
    "Detached copies in the same memory layout, those of the student wanting gradients."
    copies = {name: tap.detach().clone().requires_grad_(wanted) for name, tap in taps.items()}
    features = taps.features and {name: value.detach() if torch.is_tensor(value) else value
                                  for name, value in taps.features.items()}
    return Taps(copies, features, taps._decoder)


def forward_backward(forward, student):
    "A function that computes a loss and its gradients in the student's taps."
    def run():
        for tap in student.values():
            tap.grad = None
        loss = forward()
        loss.backward()
        return loss.item()
    return run


def whole(term, student, teacher, batch):
    "The sum of the scalars of a term, built on these shapes."
    shapes = [{name: tuple(tap.shape) for name, tap in taps.items()} for taps in (student, teacher)]
    term.build(*shapes)
    return lambda: sum(term(student, teacher, batch, frozenset(term.names)).values())


def plain_kd(student, teacher):
    "KD at temperature 1 as the equation is written."
    p, q = student.softmax(1), teacher.softmax(1)
    return (q * (q.log() - p.log())).sum(1).mean()


def plain_at(student, teacher):
    "AT of one pair as the equation is written."
    maps = [F.interpolate(x.square().mean(1, keepdim=True), student.shape[2:]).flatten(1)
            for x in (student, teacher)]
    return F.mse_loss(*(m / m.norm(dim=1, keepdim=True) for m in maps))


def functions(student, teacher, batch):
    "name -> pure function without a Term; `plain NAME` is the plain form of a Term."
    from monai.losses import DiceCELoss
    pair, label = (student["out"], teacher["out"]), batch["label"]
    pairs = [(student[name], teacher[name]) for name in ("encoder", "decoder")]
    monai = DiceCELoss(to_onehot_y=True, softmax=True)
    return {
        "kd_sigmoid_mse": lambda: logits.kd_sigmoid_mse(*pair),
        "focal_dice": lambda: task.focal_dice(pair[0], label),
        "pairwise": lambda: skd.pairwise(*pairs[0]),
        "plain KD": lambda: plain_kd(*pair),
        "plain AT": lambda: sum(plain_at(*p) for p in pairs),
        "plain Seg": lambda: monai(pair[0], label[:, None]),
    }


def memory(forward):
    "(MiB saved for backward, MiB held at most), taps apart, gradients included."
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        forward().backward()
    events = prof.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return saved, most / 2 ** 20


def costs(forward, student, teacher):
    "saved and peak MiB of one term, with the taps' own storage left out."
    own = {tap.untyped_storage().data_ptr() for taps in (student, teacher) for tap in taps.values()}
    for tap in student.values():
        tap.grad = None
    saved, peak = memory(forward)
    return sum(size for place, size in saved.items() if place not in own) / 2 ** 20, peak


def measure(name, setting, quick):
    "The rows of one setting, and the terms left out with the reason."
    torch.manual_seed(0)
    teacher_net, student_net, batch, terms, lacking = tap_both(setting)
    with torch.no_grad():
        teacher = leaves(teacher_net(batch["image"]), False)
    student = leaves(student_net(batch["image"]), True)
    forwards = {}
    for term in terms:
        title = type(term).__name__
        try:
            forward = whole(term, student, teacher, batch)
            forward_backward(forward, student)()
            forwards[title] = forward
        except UNFIT as error:
            lacking[title] = reason(error)
    forwards |= functions(student, teacher, batch)
    runs = {title: forward_backward(forward, student) for title, forward in forwards.items()}
    values = {title: run() for title, run in runs.items()}
    times = interleaved(dict(floor=floor(teacher_net, student_net, batch["image"])) | runs,
                        2 if quick else 3, dict.fromkeys(runs, 3 if quick else 5))
    for title in values:
        mine, other = values[title], values.get(f"plain {title}", values[title])
        assert abs(mine - other) <= 1e-5 * max(1, abs(other)), f"{title}: {mine}, plain {other}"
    return [row(name, setting, title, times, costs(forward, student, teacher))
            for title, forward in forwards.items() if not title.startswith("plain ")], lacking


def verdict(share, title):
    "Whether a share keeps its limit; nothing without one."
    return "" if title not in LIMITS else "met" if share <= LIMITS[title] else "NOT MET"


def row(name, setting, title, times, held):
    "One row of the table."
    share = times[title] / times["floor"]
    entry = {"setting": name, "images": "x".join(map(str, setting.shape)),
             "classes": setting.classes, "networks": setting.networks,
             "floor ms": 1000 * times["floor"], "term": title, "term ms": 1000 * times[title],
             "share of the floor": share, "limit": LIMITS.get(title),
             "": verdict(share, title),
             "saved MiB": held[0], "peak MiB": held[1]}
    if f"plain {title}" in times:
        entry["plain form / ours"] = times[f"plain {title}"] / times[title]
    return entry


def main():
    args = arguments(__doc__)
    rows, notes = [], []
    for name, setting in settings(args.quick).items():
        found, lacking = measure(name, setting, args.quick)
        rows += found
        notes += [f"{name}: {title} left out: {why}" for title, why in lacking.items()]
    verdicts = [f"{row['setting']}, {row['term']}: {row['share of the floor']:.4f} of the floor, "
                f"wanted at most {row['limit']}: {row['']}" for row in rows if row["limit"]]
    report("terms", rows, notes + verdicts, args,
           "Plain form: the equation as it is written, for Seg MONAI's DiceCELoss; equal to 1e-5.")


if __name__ == "__main__":
    main()
