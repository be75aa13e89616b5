"""What the trainer refuses before it starts, what stops it, and what it does in each step."""
import math
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from medkd.core import Term, Tapped, rng_state
from medkd.losses.at import AT
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.trainers import NotFinite, Recipe, Trainer, cosine, fit
from medkd.trainers.checkpoint import read_checkpoint
from medkd.trainers.objective import check_wiring
from medkd.trainers.trainer import make_accelerator

short = replace(toy.alone, steps=3, epochs=None)


# not finite
class Poisoned(Term):
    "Infinite in step 3: `value` or only its gradient."
    names = ("poisoned",)

    def __init__(self, gradient=False):
        super().__init__()
        self.gradient, self.calls = gradient, 0

    def forward(self, student, teacher, batch, active):
        self.calls += 1
        logit = student["out"].mean()
        if self.calls < 4: return dict(poisoned=logit) # the wiring check is the first call
        return dict(poisoned=(logit - logit.detach()).sqrt() if self.gradient else logit / 0)


@pytest.mark.parametrize("gradient, message", [
    (False, "loss poisoned is not finite in step 2, cases case0-"),
    (True, "gradient of poisoned is not finite in step 2")])
def test_not_finite_stops_in_that_step(tmp_path, gradient, message):
    recipe = replace(toy.alone, terms=(Seg, partial(Poisoned, gradient)),
                     weights=dict(seg=1, poisoned=.1))
    with pytest.raises(NotFinite, match=message): fit(recipe, tmp_path/"run")
    folder = toy.only_run(tmp_path)
    state = read_checkpoint(folder/"last.pt")
    assert state["step"] == 2 and all(torch.isfinite(t).all() for t in state["objective"].values())
    assert len((folder/"metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("norm", [False, True])
def test_one_bad_image_is_named_alone(tmp_path, norm):
    "In the first batch before the first step, in a later one in its step; batch statistics or not."
    places = Trainer(replace(short, data=toy.squares()), toy.squares(), tmp_path).places_from(0, 2)
    for step, batch in enumerate(places):
        bad = batch[1][1]
        recipe = replace(short, data=partial(toy.squares, bad=(bad,)),
                         student=partial(toy.Net, norm=norm))
        with pytest.raises(NotFinite) as caught: fit(recipe, tmp_path/"run")
        assert str(caught.value).count("case0-") == 1 and f"cases case0-{bad}" in str(caught.value)
        when = "before the first step" if step == 0 else "loss seg is not finite in step 1"
        assert when in str(caught.value)



def test_discriminator_that_is_not_finite(tmp_path):
    recipe = replace(toy.distil, adversary=NanJudge,
                     weights=toy.distil.weights | dict(adversarial=.1))
    with pytest.raises(NotFinite, match="loss judge is not finite in step 0"):
        fit(recipe, tmp_path/"run")


class NanJudge(toy.Judge):
    def forward(self, student, teacher, batch):
        return dict(judge=self.net(student["out"]).mean() * math.nan)


# the wiring check
class Severed(Term):
    names, needs = ("severed",), (("encoder",), ())
    def forward(self, student, teacher, batch, active):
        return dict(severed=student["encoder"].detach().mean())


class Forgetful(Term):
    names = ("kept", "forgotten")
    def forward(self, student, teacher, batch, active):
        return dict(kept=student["out"].square().mean())


class Constant(toy.Net):
    def encode(self, x): return dict(bottleneck=0 * super().encode(x)["bottleneck"])


class Asks(Term):
    names, needs = ("asks",), (("decodr",), ())


@pytest.mark.parametrize("change, error, message", [
    (dict(terms=(Seg, Severed), weights=dict(seg=1, severed=1)), ValueError,
     "'severed' gives no gradient"),
    (dict(terms=(Seg, Forgetful), weights=dict(seg=1, kept=1, forgotten=1)), ValueError,
     "no term returned forgotten"),
    (dict(student=Constant), ValueError, "'out' of the student is constant"),
    (dict(terms=(Seg, Asks), weights=dict(seg=1, asks=1)), KeyError,
     "'decodr'; did you mean decoder"),
    (dict(terms=(Seg, KD)), KeyError, "no weight for kd"),
    (dict(weights=dict(seg=1, kd=1)), KeyError, "no term gives kd"),
    (dict(terms=(Seg, Seg)), KeyError, "two terms give seg"),
    (dict(weights=dict(seg=lambda epoch: 0.)), ValueError, "all weights are 0 in step 0"),
    (dict(terms=(Seg, KD), weights=dict(seg=1, kd=1)), KeyError, "asked of a teacher, and there is none"),
    (dict(teacher=toy.Net), ValueError, "is a fresh network"),
    (dict(batch_size=4, data=partial(toy.squares, n=0)), ValueError, "the training set is empty"),
])
def test_refused_before_training(tmp_path, change, error, message):
    with pytest.raises(error, match=message): fit(replace(short, **change), tmp_path/"run")
    assert not list(tmp_path.glob("*/last.pt"))


@pytest.mark.parametrize("change, error, message", [
    (dict(epochs=3, steps=3), ValueError, "contradict"),
    (dict(lr=0), ValueError, "lr=0; expected a positive"),
    (dict(batch_size=-1), ValueError, "batch_size=-1"),
    (dict(terms=Seg), TypeError, "a tuple of Term classes"),
    (dict(terms=(Seg(),)), TypeError, "give the class"),
    (dict(precision="half"), ValueError, "expected auto, fp32"),
    (dict(student="unet"), TypeError, "'unet' is no network")])
def test_recipes_that_cannot_be_meant(change, error, message):
    with pytest.raises(error, match=message): replace(toy.alone, **change)


def test_wiring_check_leaves_no_trace(tmp_path):
    splits = toy.squares()
    trainer = Trainer(replace(toy.everything, data=splits), splits, tmp_path)
    batch = trainer.first_batch()
    work = trainer.work(batch, frozenset(trainer.recipe.weights))
    def state():
        nets = trainer.module, trainer.adversary
        return [toy.flat(dict(net.state_dict())) for net in nets], toy.flat(rng_state())
    before = state()
    report = check_wiring(trainer.module, trainer.teacher, work)
    assert before == state() and set(report) == {*trainer.recipe.weights, "unreached"}
    assert all(p.grad is None for p in trainer.module.parameters())


def test_starting_weights_do_not_depend_on_the_teacher(tmp_path):
    nets = []
    for teacher in (None, toy.teacher, drawn_teacher):
        recipe = replace(toy.alone, teacher=teacher)
        student = Trainer(recipe, toy.squares(), tmp_path).module.student.net
        nets.append(toy.flat(dict(student.state_dict())))
    assert nets[0] == nets[1] == nets[2]


def drawn_teacher(): return toy.Net(16)


drawn_teacher.loads_weights = True


# trackers
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    plain = fit(short, tmp_path/"plain"/"run")
    run = fit(short, tmp_path/"run", trackers=("tensorboard",))
    assert toy.outcome(run.path) == toy.outcome(plain.path)
    events = EventAccumulator(str(next(run.path.rglob("events.*")).parent)).Reload()
    assert set(events.Tags()["scalars"]) == {"seg", "dice"}
    assert [e.step for e in events.Scalars("seg")] == [1, 2, 3]
    logged = [row["losses"]["seg"] for row in run.metrics("train")]
    assert [e.value for e in events.Scalars("seg")] == pytest.approx(logged)


def test_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match="tracker 'tensorbord' is unknown or not installed"):
        fit(short, tmp_path/"run", trackers=("tensorbord",))
    assert not list(tmp_path.iterdir())


class Greedy:
    "A tracker library that draws when it starts, as some do to name a run."
    def __call__(self, *args, **kwargs): random.random(), np.random.rand(), torch.rand(1)


def test_trackers_draw_nothing_from_the_run(tmp_path, monkeypatch):
    expected = toy.outcome(fit(toy.everything, tmp_path/"plain"/"run").path)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", Greedy())
    assert toy.outcome(fit(toy.everything, tmp_path/"run").path) == expected


# weights, schedules, lengths
def floor_schedule(epoch, every=1): return .5 * (math.floor(epoch / every) + 1)


def warm_up(epoch, epochs=2): return min(1., epoch / epochs)


class Counted(KD):
    calls = []
    def forward(self, student, teacher, batch, active):
        self.calls.append(active)
        return super().forward(student, teacher, batch, active)


def test_weights_are_functions_of_progress(tmp_path):
    Counted.calls.clear()
    recipe = replace(toy.distil, terms=(Seg, Counted, AT), epochs=3,
                     weights=dict(seg=1, kd=warm_up, at=floor_schedule))
    rows = fit(recipe, tmp_path/"run").metrics("train")
    assert [row["epoch"] for row in rows] == [0, .5, 1, 1.5, 2, 2.5]
    assert [row["weights"]["at"] for row in rows] == [.5, .5, 1, 1, 1.5, 1.5]
    assert [row["weights"]["kd"] for row in rows] == [0, .25, .5, .75, 1, 1]
    assert "kd" not in rows[0]["losses"] and "kd" in rows[1]["losses"]
    assert len(Counted.calls) == 1 + 5 # the wiring check, and the steps where its weight is not 0


def test_optimiser_and_schedule(tmp_path):
    recipe = replace(short, optimiser=partial(torch.optim.SGD, momentum=.9), schedule=cosine, lr=.2,
                     steps=4)
    run = fit(recipe, tmp_path/"run")
    rates = [.2 * cosine(step / 2, 2) for step in range(4)]
    assert [row["lr"] for row in run.metrics("train")] == pytest.approx(rates)
    assert "momentum_buffer" in read_checkpoint(run.path/"last.pt")["optimiser"]["state"][0]
    assert run.report["steps"] == 4 and run.report["epochs"] == 2
    constant = fit(replace(recipe, schedule=partial(toy_poly, power=2.)), tmp_path/"run")
    assert constant.path != run.path and constant.metrics("train")[2]["lr"] == pytest.approx(.05)


def toy_poly(epoch, epochs, power): return (1 - epoch / epochs) ** power


def test_data_smaller_than_a_batch(tmp_path):
    run = fit(replace(short, data=partial(toy.squares, n=3), batch_size=8), tmp_path/"run")
    assert run.report["epochs"] == 3 and len(run.metrics("val")) == 3


def test_no_validation_set_keeps_the_last_weights(tmp_path):
    run = fit(replace(short, data=partial(toy.squares, val=0)), tmp_path/"run")
    assert run.report["selected_by"] == "last step" and run.report["best"] is None
    last = read_checkpoint(run.path/"last.pt")["objective"]
    for name, tensor in run.network().state_dict().items():
        assert torch.equal(tensor, last[f"student.net.{name}"])


def scripted(net, loader, scores): return dict(score=scores.pop(0) if scores else math.nan)


@pytest.mark.parametrize("scores, best",
                         [((.5, math.nan, .4), (.5, 2)), ((math.nan, .3, math.nan), (.3, 4)),
                                          ((math.nan,) * 3, (None, 6)), ((.3, .3, .6), (.6, 6))])
def test_nan_never_replaces_a_score(tmp_path, scores, best):
    recipe = replace(toy.alone, epochs=3, validate=partial(scripted, scores=list(scores)))
    report = Trainer(recipe, toy.squares(), tmp_path).fit()
    assert (report["best"], report["best_step"]) == best
    assert report["selected_by"] == ("last step" if best[0] is None else "validation")


# other inputs than the image
def averaged(batch, teacher):
    "The image averaged over each class of the label: what an oracle sees."
    image, label = batch["image"][:, 0], batch["label"]
    inside = label == 1
    def mean(mask): return (image * mask).sum((1, 2), True) / mask.sum((1, 2), True).clamp(min=1)
    return torch.where(inside, mean(inside), mean(~inside))[:, None]


def oracle_sees(batch): return averaged(batch, None)


def test_oracle(tmp_path):
    oracle = fit(replace(toy.alone, student_input=averaged, epochs=12), tmp_path/"oracle")
    alone = fit(replace(toy.alone, epochs=12), tmp_path/"alone")
    assert oracle.report["best"] > alone.report["best"]
    student = fit(replace(toy.distil, teacher=oracle, teacher_input=oracle_sees),
                  tmp_path/"student")
    assert set(student.metrics("train")[0]["losses"]) == {"seg", "kd", "at"}


class Coder(nn.Module):
    "Reads and rebuilds a feature of the teacher."
    def __init__(self):
        super().__init__()
        self.code, self.out = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
    def forward(self, x): return self.out(self.code(x))


class Rebuild(Term):
    names, needs = ("rebuild",), ((), ("encoder",))
    def forward(self, student, teacher, batch, active):
        return dict(rebuild=F.mse_loss(student["out"], teacher["encoder"]))


def encoder_of(batch, teacher): return teacher["encoder"]


def rebuilt(net, loader):
    inputs = [net.input(batch) for batch in loader]
    return dict(negative_error=-sum(F.mse_loss(net(x), x).item() for x in inputs) / len(inputs))


def test_stage_on_a_feature_of_the_teacher(tmp_path):
    recipe = replace(toy.alone, student=Coder, teacher=toy.teacher, student_input=encoder_of,
                     validate=rebuilt,
                     terms=(Rebuild,), weights=dict(rebuild=1), epochs=6)
    run = fit(recipe, tmp_path/"run")
    scores = [row["scores"]["negative_error"] for row in run.metrics("val")]
    assert scores[-1] > scores[0] and run.report["best"] == max(scores)


# precision
class Probe(Term):
    "What a term and a network see under autocast; the graph of `decode` reaches the student."
    names, needs, seen = ("probe",), (("encoder",), ("encoder",)), []

    def forward(self, student, teacher, batch, active):
        half = Half.dtypes[-1]
        decoded = student.decode(dict(bottleneck=student["encoder"]))
        self.seen.append((student["encoder"].dtype, student["out"].dtype, teacher["encoder"].dtype,
                          decoded.dtype,
                          (student["encoder"].flatten(1) @ student["encoder"].flatten(1).T).dtype,
                          torch.is_autocast_enabled("cpu"), half, Half.dtypes[-1]))
        return dict(probe=decoded.square().mean())


class Half(toy.Net):
    dtypes = []
    def decode(self, features):
        logits = super().decode(features)
        self.dtypes.append(logits.dtype)
        return logits


@pytest.mark.parametrize("precision, inside", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_terms_are_float32(tmp_path, precision, inside):
    Probe.seen.clear()
    recipe = replace(short, student=partial(Half, norm=True), teacher=toy.teacher,
                     terms=(Seg, Probe),
                     weights=dict(seg=1, probe=.1), precision=precision)
    run = fit(recipe, tmp_path/"run")
    assert set(Probe.seen) == {(*[torch.float32] * 5, False, inside, inside)}
    assert run.params["decided"]["precision"] == precision
    assert all(t.dtype != torch.bfloat16 for t in run.network().state_dict().values())


def test_fp16_needs_a_gpu(tmp_path):
    if torch.cuda.is_available():
        assert fit(replace(short, precision="fp16"), tmp_path/"run").complete
    else:
        with pytest.raises(ValueError, match="'fp16' needs a GPU, there is none here; use 'bf16'"):
            fit(replace(short, precision="fp16"), tmp_path/"run")


def test_precisions_one_after_another(tmp_path):
    for precision in ("fp32", "bf16", "fp32"):
        accelerator = make_accelerator(precision, (), tmp_path)
        assert accelerator.mixed_precision == dict(fp32="no", bf16="bf16")[precision]


def test_scaler_is_part_of_the_checkpoint(tmp_path):
    splits = toy.squares()
    trainers = [Trainer(replace(short, data=splits), splits, tmp_path) for _ in range(2)]
    for trainer, scale in zip(trainers, (1024., 8.)):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale,
                                                          growth_interval=7)
        trainer.before = trainer.started = 0
    state = trainers[0].state()
    assert state["scaler"]["scale"] == 1024.
    trainers[1].load(state)
    assert trainers[1].accelerator.scaler.get_scale() == 1024.


def test_recipe_defaults():
    recipe = Recipe(data=toy.squares, student=toy.Net, terms=[Seg], weights=dict(seg=1))
    assert recipe.terms == (Seg,) and Tapped(recipe.student()).names == ()
