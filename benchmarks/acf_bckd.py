"""Share of the floor of a step that ACF-BCKD and its comparators take with the paper's networks.

python benchmarks/acf_bckd.py [--quick] [--json PATH]

The floor is the forward of ResU-Net (`resunet3d`) without gradients and the forward, backward and
optimiser step of U-Net tiny (`unet3d_tiny`) with a trivial loss, in float32. Logits are made from the
labels, so that every class is in the label, the teacher's decision and the student's: distances in
empty masks would cost nothing. Features are the networks'. At 48^3 each loss is compared with its
equation as it is written: value and gradient in float64, to 1e-5 of the largest, and time in float32.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from common import arguments, blobs, interleaved, report
from terms import floor, forward_backward, leaves

from medkd.core import Taps, Tapped, freeze
from medkd.losses.acf_bckd import AttentionCorrection, hard_boundary, soft_boundary
from medkd.losses.at import at
from medkd.losses.cirkd import CIRKD, minibatch
from medkd.losses.ifvd import ifvd
from medkd.losses.logits import cwd, dist, dkd, kd_kl, kd_sigmoid_mse, nkd
from medkd.models.zoo import build

LIMITS = {"hard boundary": .1, "soft boundary": .35, "soft boundary, sure student": .35, "KD": .05,
          "KD, sigmoid": .05, "CWD": .05, "DKD": .06, "NKD": .06, "DIST": .12, "AT": .1, "IFVD": .1,
          "CIRKD": .3, "CIRKD, as published": .3}
FEW = {"soft boundary": .2, "soft boundary, sure student": .2}  # with 5 foreground classes
LEVELS = "e1", "e2", "e3", "e4", "d3", "d2", "out"  # of AT


@dataclass
class Case:
    "What the losses of one size are computed on."
    student: Taps
    teacher: Taps
    label: torch.Tensor
    floor: object  # function of a step's least


def case(shape, classes, width):
    "Networks, their features on blobs, logits made from the labels, and the floor."
    torch.manual_seed(0)
    teacher = Tapped(freeze(build("resunet3d", 1, classes, width)), [*LEVELS[:-1], "decoder", "branch", "head_in"])
    student = Tapped(build("unet3d_tiny", 1, classes, width), [*LEVELS[:-1], "decoder", "head_in"])
    image, label = blobs(shape[0], shape[2:], classes)
    with torch.no_grad():
        mine, theirs = leaves(student(image), True), leaves(teacher(image), False)
    mine["out"], theirs["out"] = decided(label, classes, 4., .5).requires_grad_(), decided(label, classes, 8., .3)
    for name, prob in dict(student=mine["out"].softmax(1) > .5, teacher=theirs["out"].argmax(1)[:, None] == arange(classes)).items():
        assert prob.flatten(2).any(2).all(), f"a class is in no image of the {name}"
    return Case(mine, theirs, label, floor(teacher, student, image))


def arange(classes): return torch.arange(classes).view(1, -1, 1, 1, 1)


def decided(label, classes, strength, noise):
    "Logits for the label, blurred at its boundaries."
    mark = (label[:, None] == arange(classes)).float()
    return strength * F.avg_pool3d(mark, 3, 1, 1) + noise * torch.randn(mark.shape)


def losses(case):
    "name -> function of the student's taps, as the paper configures them."
    classes, label, t = case.student["out"].shape[1], case.label, case.teacher
    correction = AttentionCorrection(case.student["decoder"].shape[1])
    def cirkd(**options):
        term = CIRKD("head_in", **options)
        term.build(*({name: tap.shape for name, tap in taps.items()} for taps in (case.student, t)))
        return lambda s: sum(term(s, t, dict(label=label), frozenset(term.names)).values())
    sure = decided(label, classes, 40., 8.)
    return {
        "hard boundary": lambda s: hard_boundary(s["out"], t["out"], label),
        "soft boundary": lambda s: soft_boundary(s["out"], t["out"]),
        "soft boundary, sure student": lambda s: soft_boundary(s["out"] + sure, t["out"]),
        "attention correction": lambda s: sum(correction(s["decoder"], t["decoder"], t["branch"])),
        "KD": lambda s: kd_kl(s["out"], t["out"]),
        "KD, sigmoid": lambda s: kd_sigmoid_mse(s["out"], t["out"]),
        "CWD": lambda s: cwd(s["out"], t["out"]),
        "NKD": lambda s: nkd(s["out"], t["out"], label),
        "DKD": lambda s: dkd(s["out"], t["out"], label),
        "DIST": lambda s: dist(s["out"], t["out"]),
        "AT": lambda s: sum(at(s[name], t[name]) for name in LEVELS),
        "IFVD": lambda s: ifvd(s["d2"], t["d2"], label, classes),
        "CIRKD": cirkd(),
        "CIRKD, as published": cirkd(first_only=True, positions_by_rank=True),
        "CIRKD, mini-batch alone": lambda s: minibatch(s["head_in"], t["head_in"]),
    }


def plain(case):
    "name -> function of the student's taps: the equations as they are written."
    label, classes = case.label, case.student["out"].shape[1]
    mark = (label[:, None] == arange(classes))
    teacher = lambda s, name: case.teacher[name].to(s[name].dtype)
    kl = lambda log_p, q: (q * (q.log() - log_p)).sum()
    rows = lambda z: z.movedim(1, -1).flatten(0, -2)
    voxels = label.numel()

    def on_logits(function): return lambda s: function(s["out"], teacher(s, "out"))

    def hard(s, t):
        total, kernel = 0, torch.ones(1, 1, 3, 3, 3)
        kernel[..., 1, 1, 1] = 0
        for b in range(len(s)):
            for c in range(classes):
                n = F.conv3d(mark[b:b + 1, c:c + 1].float(), kernel, padding=1)[0, 0]
                edge = (n > 0) & (n < 26)
                total += kl(s[b].log_softmax(0)[:, edge], t[b].softmax(0)[:, edge]) / classes / edge.sum()
        return total

    def soft(s, t):
        prob, target = s.softmax(1)[:, 1:], (t.argmax(1, keepdim=True) == arange(classes))[:, 1:]
        def field(masks): return torch.stack([square(m.numpy()) for m in masks.flatten(0, 1)]).view(prob.shape)
        apart = field(prob.detach() > .5) + field(target)
        return ((prob - target.to(prob.dtype)) ** 2 * apart).mean().add(1).log()

    def square(mask):
        if mask.all() or not mask.any(): return torch.zeros(mask.shape)
        return torch.from_numpy((distance_transform_edt(mask) + distance_transform_edt(~mask)) ** 2)

    def split(s, t):
        y = rows(mark).double()
        return [torch.stack([(p * y).sum(1), (p * (1 - y)).sum(1)], 1) for p in (s, t)]

    def decoupled(s, t):
        s, t, y = rows(s) / 4, rows(t) / 4, rows(mark).to(s.dtype)
        binary = split(s.softmax(1), t.softmax(1))
        others = F.kl_div((s - 1000 * y).log_softmax(1), (t - 1000 * y).softmax(1), reduction="sum")
        return 16 * (kl(binary[0].log(), binary[1]) + 8 * others) / voxels

    def normalised(s, t):
        s, t, y = rows(s), rows(t), rows(mark)
        own = (t.softmax(1) * s.log_softmax(1))[y].mean()
        s, t = (z[~y].view(voxels, -1) for z in (s, t))
        return -own - 1.5 * (t.softmax(1) * s.log_softmax(1)).sum(1).mean()

    def correlated(s, t):
        def rho(x, y):
            x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
            return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()
        s, t = rows((s / 4).softmax(1)), rows((t / 4).softmax(1))
        return 16 * (2 - rho(s, t) - rho(s.T, t.T))

    def attention(s):
        unit = lambda x: F.normalize(x.square().mean(1).flatten(1), dim=1)
        return sum((unit(s[name]) - unit(teacher(s, name))).square().mean() for name in LEVELS)

    def variation(x, y):
        centres = x.clone()
        for b in range(len(x)):
            for k in y[b].unique():
                here = y[b] == k
                centres[b][:, here] = (x[b][:, here].sum(1) / (here.sum() + 1e-6))[:, None]
        return F.cosine_similarity(x, centres, dim=1)

    def intra(s):
        x, y = s["d2"], label[:, ::2, ::2, ::2]
        return (variation(x, y) - variation(teacher(s, "d2"), y)).square().mean()

    def related(s):
        x, y = (F.normalize(F.avg_pool3d(f, 2, 2, ceil_mode=True), dim=1).flatten(2)
                for f in (s["head_in"], teacher(s, "head_in")))
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
        maps = [((x[i].T @ x[j]).log_softmax(1), (y[i].T @ y[j]).softmax(1)) for i, j in pairs]
        return sum(kl(*each) for each in maps) / len(pairs) / x.shape[2]

    return {
        "hard boundary": on_logits(hard), "soft boundary": on_logits(soft),
        "KD": on_logits(lambda s, t: kl(s.log_softmax(1), t.softmax(1)) / voxels),
        "KD, sigmoid": on_logits(lambda s, t: (s.sigmoid() - t.sigmoid()).square().mean()),
        "CWD": on_logits(lambda s, t: 16 * kl((s / 4).flatten(2).log_softmax(2), (t / 4).flatten(2).softmax(2)) / s[:, :, 0, 0, 0].numel()),
        "NKD": on_logits(normalised), "DKD": on_logits(decoupled), "DIST": on_logits(correlated),
        "AT": attention, "IFVD": intra, "CIRKD, mini-batch alone": related,
    }


def gradients(loss, taps):
    "Value, and gradient of every tap that has one."
    taps = Taps({name: tap.detach().clone().requires_grad_() for name, tap in taps.items()})
    value = loss(taps)
    value.backward()
    return value.item(), {name: tap.grad for name, tap in taps.items() if tap.grad is not None}


def check(name, ours, theirs, taps):
    "AssertionError unless value and gradients are the plain form's, which is computed in float64."
    value, grads = gradients(ours, taps)
    expected, plain_grads = gradients(theirs, {tap: x.double() for tap, x in taps.items()})
    assert abs(value - expected) <= 1e-5 * abs(expected), f"{name}: {value}, plain {expected}"
    for tap, grad in plain_grads.items():
        error = (grads[tap] - grad).abs().max() / grad.abs().max()
        assert error <= 1e-5, f"{name}: gradient of {tap} differs by {error:.1e}"


def measure(shape, classes, width, rounds, repeats, compare):
    "Rows of one size."
    made = case(shape, classes, width)
    ours = losses(made)
    written = plain(made) if compare else {}
    for name, function in written.items():
        check(name, ours[name], function, made.student)
    runs = {name: forward_backward(lambda f=f: f(made.student), made.student) for name, f in ours.items()}
    runs |= {f"plain {name}": forward_backward(lambda f=f: f(made.student), made.student) for name, f in written.items()}
    times = interleaved(dict(floor=made.floor) | runs, rounds, dict.fromkeys(runs, repeats))
    limits = LIMITS | (FEW if classes <= 6 else {}) if width == 1 else {}
    return [row(name, shape, classes, times, limits.get(name)) for name in ours]


def row(name, shape, classes, times, limit):
    "One row of the table."
    share, written = times[name] / times["floor"], times.get(f"plain {name}")
    return {"images": "x".join(map(str, shape)), "classes": classes, "floor ms": 1000 * times["floor"],
            "loss": name, "loss ms": 1000 * times[name], "share of the floor": share, "limit": limit,
            "": limit and ("met" if share <= limit else "NOT MET"),
            "plain form / ours": written and written / times[name]}


def settings(quick):
    "Arguments of `measure`; the last is the paper's batch."
    if quick: return [((1, 1, 16, 16, 16), 6, .125, 1, 1, True)]
    return [((2, 1, 48, 48, 48), 14, 1., 3, 3, True), ((2, 1, 48, 48, 48), 6, 1., 3, 3, True),
            ((4, 1, 96, 96, 96), 14, 1., 1, 1, False)]


def main():
    args = arguments(__doc__)
    rows = [row for setting in settings(args.quick) for row in measure(*setting)]
    verdicts = [f"{row['images']}, {row['classes']} classes, {row['loss']}: {row['share of the floor']:.4f} of the "
                f"floor, wanted at most {row['limit']}: {row['']}" for row in rows if row["limit"]]
    report("acf_bckd", rows, verdicts, args,
           "Floor: resunet3d teaches unet3d_tiny. Plain form: the equation as it is written; equal to 1e-5.")


if __name__ == "__main__":
    main()
