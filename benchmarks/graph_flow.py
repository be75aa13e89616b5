"""Share of the floor of a distilled step that the parts of Graph Flow take.

python benchmarks/graph_flow.py [--quick] [--json PATH]

The floor is FANet's forward without gradients and Mobile U-Net's forward, backward and optimiser step
with a trivial loss, at 256 x 256 and batch 8, in float32. A part's cost is its own forward and its
backward to detached copies of the taps; `GraphFlow` includes both Paraphrasers, `graph_flow` does not.
The discriminator's step is its forward on both predictions, the gradient penalty, backward and Adam.
All take turns in one process.
"""
from functools import partial

import torch

from common import arguments, blobs, interleaved, report
from terms import floor, forward_backward, gkd, leaves, whole

from medkd.core import Tapped, freeze
from medkd.losses.graph_flow import GraphFlow, Paraphraser, graph_flow
from medkd.losses.logits import KD
from medkd.losses.skd import Holistic

LIMITS = dict(GraphFlow=.1)  # shares of the floor
TAPS = ("encoder", "decoder")


def setting(images, size, width):
    "Both networks with their taps and a batch, in the training's layout; the teacher of a width."
    torch.manual_seed(0)
    what = gkd((images, 1, size, size), width)
    teacher, student = (make().to(memory_format=torch.channels_last) for make in (what.teacher, what.student))
    image, label = blobs(images, (size, size), 2)
    batch = dict(image=image.contiguous(memory_format=torch.channels_last), label=label)
    return Tapped(freeze(teacher), TAPS), Tapped(student, TAPS), batch


def parts(teacher_net, student_net, batch):
    "name -> function that does one part's work."
    with torch.no_grad():
        teacher = leaves(teacher_net(batch["image"]), False)
    student = leaves(student_net(batch["image"]), True)
    pairs = [[taps[name] for name in TAPS] for taps in (student, teacher)]
    channels = [[f.shape[1] for f in pair] for pair in pairs]
    paraphrasers = [Paraphraser(theirs, ours).to(memory_format=torch.channels_last) for ours, theirs in zip(*channels)]
    with torch.no_grad():
        factors = [one.encode(f) for one, f in zip(paraphrasers, pairs[1])]
    losses = dict(graph_flow=lambda: sum(graph_flow(pairs[0], factors)),
                  GraphFlow=whole(GraphFlow(paraphrasers), student, teacher, batch),
                  KD=whole(KD(), student, teacher, batch))
    adversary = discriminator(student, teacher)
    losses["adversarial, student's part"] = lambda: adversary.student(student, teacher, batch)["adversarial"]
    functions = {name: forward_backward(forward, student) for name, forward in losses.items()}
    return functions | {"discriminator's step": discriminator_step(adversary, student, teacher, batch)}


def discriminator(student, teacher):
    "Graph Flow's."
    adversary = Holistic(preprocess="tanh", scale=1.)
    adversary.build(*({name: tuple(tap.shape) for name, tap in taps.items()} for taps in (student, teacher)))
    return adversary


def discriminator_step(adversary, student, teacher, batch):
    "A function that trains the discriminator once."
    optimiser = torch.optim.Adam(adversary.parameters(), lr=3e-5, betas=(.9, .99))

    def step():
        sum(adversary(student, teacher, batch).values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return step


def measure(name, images, size, width, rounds):
    "One row for each part."
    teacher, student, batch = setting(images, size, width)
    cheap = dict(graph_flow=10, GraphFlow=3, KD=10)
    functions = dict(floor=floor(teacher, student, batch["image"])) | parts(teacher, student, batch)
    times = interleaved(functions, rounds, cheap)
    rows = []
    for part, seconds in times.items():
        share, limit = seconds / times["floor"], LIMITS.get(part)
        verdict = "" if limit is None else "met" if share <= limit else "NOT MET"
        rows.append({"networks": name, "part": part, "ms": 1000 * seconds, "share of the floor": share, "limit": limit, "": verdict})
    return rows


def main():
    args = arguments(__doc__)
    torch.set_num_threads(1)
    widths = (.125,) if args.quick else (.25, 1.)
    images, size = (2, 64) if args.quick else (8, 256)
    title = partial("FANet x{:g} -> Mobile U-Net, {}x{}x{}".format)
    rows = [row for width in widths
            for row in measure(title(width, images, size, size), images, size, width, 2 if args.quick else 3)]
    verdicts = [f"{row['networks']}, {row['part']}: {row['share of the floor']:.4f} of the floor, wanted at most "
                f"{row['limit']}: {row['']}" for row in rows if row["limit"]]
    report("graph_flow", rows, verdicts, args, "Floor: teacher's forward and student's step, see the benchmark's first lines.")


if __name__ == "__main__":
    main()
