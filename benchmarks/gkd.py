"""A step of GKD against what it cannot do without.

python benchmarks/gkd.py [--quick] [--json PATH]

The floor of B images with four views each: the teacher's forward on 5B images without gradients, the
student's forward, backward and optimiser step on them with a trivial loss, and both cross decodes of
the B anchors with their backward. The step is the trainer's: teacher, objective of cross entropy with
Dice and all three parts of GKD, backward, optimiser. All take turns in one process, in float32.
"""
import torch

from common import arguments, blobs, interleaved, report

from medkd.core import Tapped, tap_shapes
from medkd.losses.gkd import GKD, MSAN, decode_with
from medkd.losses.task import Seg
from medkd.models.zoo import build
from medkd.trainers.objective import Objective, Step, Teacher

LIMIT = 1.15


def setting(images, size, teacher_width, student_width):
    "Networks in the training's layout, their MSANs, and a batch of `images` anchors with four views each."
    torch.manual_seed(0)
    make = dict(teacher=("fanet", teacher_width), student=("mobile_unet", student_width))
    nets = {role: build(name, 1, 2, width).to(memory_format=torch.channels_last)
            for role, (name, width) in make.items()}
    shapes = {role: tap_shapes(net, (1, 1, size, size), ["bottleneck"])["bottleneck"] for role, net in nets.items()}
    msans = {role: MSAN(shape[1], shape[2:]) for role, shape in shapes.items()}
    image, label = blobs(5 * images, (size, size), 2)
    place = torch.arange(5 * images)
    batch = dict(image=image.contiguous(memory_format=torch.channels_last), label=label, view=place % 5,
                 source=place // 5, case=[f"case{i}" for i in place // 5])
    return nets, msans, batch


def floor(nets, msans, batch):
    "A function that does the least such a step can do; the learning rate is 0: it repeats."
    student, teacher = Tapped(nets["student"]), Teacher(nets["teacher"])
    optimiser = torch.optim.AdamW(student.parameters(), lr=0.)
    anchors = torch.arange(0, len(batch["image"]), 5)
    size = {role: (len(anchors), msan.channels, *msan.size) for role, msan in msans.items()}
    given = {role: torch.randn(shape).requires_grad_() for role, shape in size.items()}

    def step():
        shown, taps = teacher.taps(batch), student(batch["image"])
        crossed = [decode_with(taps, given["student"].detach(), anchors), decode_with(shown, given["teacher"], anchors)]
        sum(logits.mean() for logits in (taps["out"], *crossed)).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


def distilled(nets, msans, batch):
    "A function that does a step as the trainer does, with everything GKD has."
    terms = [Seg(), GKD(msans["teacher"], msans["student"])]
    objective, teacher = Objective(nets["student"], terms), Teacher(nets["teacher"], GKD.needs[1])
    optimiser = torch.optim.AdamW(objective.parameters(), lr=0.)
    active = frozenset(["seg", *GKD.names])

    def step():
        losses, _ = objective(Step(batch["image"], teacher.taps(batch), batch, active))
        sum(losses.values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


def settings(quick):
    "name -> (anchors, size, width of the teacher, width of the student)."
    small = {"quick preset": (2 if quick else 8, 128, .25, .5)}
    return small if quick else small | {"published widths": (2, 128, 1., 1.)}


def main():
    args = arguments(__doc__)
    torch.set_num_threads(1)
    rows, verdicts = [], []
    for name, what in settings(args.quick).items():
        made = setting(*what)
        times = interleaved(dict(floor=floor(*made), step=distilled(*made)), 2 if args.quick else 5)
        ratio = times["step"] / times["floor"]
        rows.append({"setting": name, "anchors": what[0], "floor s": times["floor"], "step s": times["step"],
                     "step / floor": ratio})
        verdicts.append(f"{name}: {ratio:.3f}, at most {LIMIT}: {'met' if ratio <= LIMIT else 'MISSED'}")
    report("gkd", rows, verdicts, args, "Floor: 5B images and two cross decodes, see the benchmark's first lines.")


if __name__ == "__main__":
    main()
