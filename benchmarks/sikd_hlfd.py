"""Class-wise averages against a loop over the classes, and HLFD's objectives against the floor of a step.

python benchmarks/sikd_hlfd.py [--quick] [--json PATH]

The loop is the equation with arithmetic masks, one class after the other, all images at once. Floor and
shares are those of terms.py, with HLFD's published networks and sizes (quick: narrow networks, two
images). The plain form concatenates, projects, resizes and calls PyTorch's divergence.
"""
from functools import partial

import torch
import torch.nn.functional as F

from common import arguments, blobs, interleaved, report
from terms import Setting, costs, floor, forward_backward, leaves, whole

from medkd.core import Tapped, freeze
from medkd.losses.emkd import EMKD
from medkd.losses.hilbert import Hilbert
from medkd.losses.hlfd import HLFD, OBJECTIVES
from medkd.losses.sikd import SIKD, classwise_mean
from medkd.models.zoo import build

FASTER, SHARE = 10, .25


def loop_mean(image, label, num_classes):
    "The class-wise averaged image, class by class."
    label, out = label[:, None], image.clone()
    for k in range(num_classes):
        region = (label == k).to(image)
        mean = (image * region).sum((2, 3), keepdim=True) / (region.sum((2, 3), keepdim=True) + 1e-8)
        out = out * (1 - region) + mean * region
    return out


def average(quick):
    "A row that compares both ways."
    image, label = blobs(20, (256, 256), 9)
    ways = dict(loop=partial(loop_mean, image, label, 9), ours=partial(classwise_mean, image, label, 9))
    assert (ways["loop"]() - ways["ours"]()).abs().max() < 1e-5
    times = interleaved(ways, 3 if quick else 10, dict(ours=3))
    ratio = times["loop"] / times["ours"]
    row = {"setting": "20x1x256x256, 9 classes", "what": "classwise_mean", "ms": 1000 * times["ours"],
           "plain form / ours": ratio}
    return row, f"classwise_mean: {ratio:.1f} times as fast as the loop, at least {FASTER}: {met(ratio >= FASTER)}"


def met(true):
    return "met" if true else "NOT MET"


def plain_combine(maps, conv):
    "Everything at the smallest size, concatenated, projected."
    size = min(tuple(m.shape[2:]) for m in maps)
    maps = torch.cat([F.interpolate(m, size, mode="bilinear") for m in maps], 1)
    return maps if conv is None else conv(maps)


def plain_pixel(student, teacher, conv):
    "PMD, CatPMD or RecPMD of lists of maps, temperature 4."
    pair = [student[0], teacher[0]]
    side = 1 if len(teacher) > 1 else 0
    moved = plain_combine((student, teacher)[side], conv)
    pair[side] = F.interpolate(moved, pair[1 - side].shape[2:], mode="bilinear")
    p, q = (x.div(4).softmax(1) for x in pair)
    return 16 * (q * (q.log() - p.log())).sum(1).mean()


def plain_feature(student, teacher, _):
    "IMD, CatIMD or RecIMD of lists of maps."
    size = (student if len(teacher) > 1 else teacher)[0].shape[2:]
    maps = [F.interpolate(plain_combine(side, None), size, mode="bilinear") for side in (student, teacher)]
    units = [F.normalize(m.pow(4).mean(1).flatten(1)) for m in maps]
    return (units[0] - units[1]).square().sum(1).mean()


def plain(objective, term, student, teacher):
    "An objective of HLFD as it is written, with the projectors of `term`; both parts summed."
    parts = dict(pixel=plain_pixel, feature=plain_feature)
    total = 0.
    for name, pairs in OBJECTIVES[objective].items():
        projectors = list(term.projectors) if name == "pixel" else [None] * len(pairs)
        for (mine, theirs, share), conv in zip(pairs, projectors):
            maps = [[taps[tap] for tap in names.split()] for taps, names in ((student, mine), (teacher, theirs))]
            total = total + share * parts[name](*maps, conv)
    return total


def setting(quick):
    "U-Net++ teaches ResNet-18, as published."
    teacher = partial(build, "unet_plus_plus", 1, 2, .25 if quick else 1.)
    student = partial(build, "resnet18", 1, 2, .5 if quick else 1.)
    shape = (2, 1, 128, 128) if quick else (8, 1, 384, 384)
    return Setting(shape, 2, teacher, student, "U-Net++ -> ResNet-18, " + ("narrow" if quick else "published"))


def shares(what, quick):
    "Rows of the objectives of HLFD and of the terms it is compared with."
    torch.manual_seed(0)
    image, label = blobs(what.shape[0], what.shape[2:], what.classes)
    batch = dict(image=image, label=label, case=[f"case{i}" for i in range(len(image))])
    terms = {f"HLFD, {name}": HLFD(name) for name in OBJECTIVES} | dict(EMKD=EMKD(), Hilbert=Hilbert(), SIKD=SIKD())
    needs = [[tap for term in terms.values() for tap in term.needs[side]] for side in (0, 1)]
    nets = [Tapped(net, names) for net, names in zip((what.student(), freeze(what.teacher())), needs)]
    with torch.no_grad():
        student, teacher = leaves(nets[0](image), True), leaves(nets[1](image), False)
    forwards = {name: whole(term, student, teacher, batch) for name, term in terms.items()}
    forwards["plain HLFD, hlfd"] = partial(plain, "hlfd", terms["HLFD, hlfd"], student, teacher)
    for name in OBJECTIVES:
        mine, other = forwards[f"HLFD, {name}"]().item(), plain(name, terms[f"HLFD, {name}"], student, teacher).item()
        assert abs(mine - other) <= 1e-5 * max(1, abs(other)), f"{name}: {mine}, plain {other}"
    runs = {name: forward_backward(forward, student) for name, forward in forwards.items()}
    times = interleaved(dict(floor=floor(nets[1], nets[0], image)) | runs, 2, dict.fromkeys(runs, 2))
    return [row(what, name, times, costs(forward, student, teacher)) for name, forward in forwards.items()]


def row(what, name, times, held):
    "One row of the table."
    found = {"setting": f"{'x'.join(map(str, what.shape))}, {what.networks}", "what": name, "ms": 1000 * times[name],
             "share of the floor": times[name] / times["floor"], "saved MiB": held[0], "peak MiB": held[1]}
    if f"plain {name}" in times:
        found["plain form / ours"] = times[f"plain {name}"] / times[name]
    return found


def main():
    args = arguments(__doc__)
    torch.set_num_threads(1)
    first, verdict = average(args.quick)
    rows, verdicts = [first], [verdict]
    for found in shares(setting(args.quick), args.quick):
        rows.append(found)
        if found["what"].startswith("HLFD") and not args.quick:  # the limit is for the published networks
            share = found["share of the floor"]
            verdicts.append(f"{found['what']}: {share:.3f} of the floor, at most {SHARE}: {met(share <= SHARE)}")
    report("sikd_hlfd", rows, verdicts, args, "Values equal the plain form to 1e-5.")


if __name__ == "__main__":
    main()
