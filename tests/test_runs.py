"""Runs as values: equal recipes find the same folder, others another; old code is noticed."""
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import toy
import torch

from medkd.core import freeze, weights_sha256
from medkd.files import read_json, write_json
from medkd.losses.logits import KD
from medkd.losses.task import Seg
from medkd.trainers import Recipe, Run, Stale, Trainer, cosine, fit, load_network
from medkd.trainers.recipe import decided_by, hash8
from medkd.trainers.run import describe, save_weights

one = replace(toy.alone, steps=1, epochs=None)


bare = partial(toy.Net, norm=False)


def named(recipe, precision="fp32"):
    teacher = recipe.teacher and recipe.teacher()
    return hash8(decided_by(recipe, recipe.data(), teacher, precision))


# idempotence
def test_complete_run_returns_at_once(tmp_path, monkeypatch):
    run = fit(one, tmp_path/"run")
    before = {p: p.stat().st_mtime_ns for p in run.path.iterdir()}
    monkeypatch.setattr(Trainer, "fit", None)
    started = time.monotonic()
    again = fit(one, tmp_path/"run", workers=1, save_every=1.)
    assert time.monotonic() - started < 1
    assert again.path == run.path and again.report == run.report
    assert {p: p.stat().st_mtime_ns for p in run.path.iterdir()} == before


def test_hash_does_not_depend_on_place_or_process(tmp_path, monkeypatch):
    here = named(toy.distil)
    code = "import toy, test_runs; print(test_runs.named(toy.distil))"
    there = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                           text=True, check=True,
                           env=os.environ | dict(PYTHONHASHSEED="5"))
    assert there.stdout.strip() == here
    monkeypatch.chdir(tmp_path)
    relative = fit(one, "a/run")
    absolute = fit(one, tmp_path/"b"/"run")
    assert relative.path.name == absolute.path.name == f"run-{named(one)}"
    assert "/" not in str(relative.params["decided"]).replace("torch/", "")
    students = [replace(one, student=Run(run.path, bare, ("toy",))) for run in (relative, absolute)]
    assert len({fit(s, tmp_path/"student").path for s in students}) == 1


changed = dict(
    data=partial(toy.squares, n=6), student=partial(toy.Net, 5), weights=dict(seg=2),
    terms=(Seg, partial(KD, tau=2.)), teacher=partial(toy.teacher, 3),
    student_input=toy.squares, teacher_input=toy.squares, validate=toy.squares,
    trainer=toy.Digests, adversary=toy.Judge, epochs=5, steps=7, validate_every=2, lr=.1,
    optimiser=torch.optim.SGD, schedule=cosine, batch_size=2, precision="bf16", clip=1., seed=1)


def test_every_field_enters_the_hash():
    assert set(changed) == {f.name for f in fields(Recipe)}
    hashes = [named(toy.alone)]
    for name, value in changed.items():
        recipe = replace(toy.alone, **({"epochs": None} if name == "steps" else {}) | {name: value})
        hashes.append(named(recipe, recipe.precision))
    assert len(set(hashes)) == len(hashes)


def test_arguments_and_local_functions_enter_the_hash():
    recipes = [replace(toy.alone, student=partial(toy.Net, width=w)) for w in (4, 6)]
    recipes += [replace(toy.alone, weights=dict(seg=lambda e, k=k: k)) for k in (1, 2)]
    recipes += [replace(toy.alone, weights=dict(seg=seg)) for seg in (lambda e: 3., lambda e: 4.)]
    def scaled(k): return lambda e: k * e
    recipes += [replace(toy.alone, weights=dict(seg=scaled(k))) for k in (1, 2)]
    assert len({named(recipe) for recipe in recipes}) == len(recipes)
    with pytest.raises(TypeError, match="cannot be part of a recipe"):
        describe(partial(toy.Net, torch.ones(2)))


# stale sources
@pytest.fixture
def stale(tmp_path):
    run = fit(one, tmp_path/"run")
    write_json(run.path/"params.json",
               run.params | dict(sources=run.params["sources"] | {"toy:Net": "another"}))
    return run


def test_stale_is_refused(stale):
    with pytest.raises(Stale, match="toy:Net changed since.*stale='rerun'.*stale='keep'"):
        fit(one, stale.path.parent/"run")
    (stale.path/"report.json").unlink()
    with pytest.raises(Stale): fit(one, stale.path.parent/"run")


def test_stale_is_kept(stale):
    before = stale.params
    assert fit(one, stale.path.parent/"run", stale="keep").path == stale.path
    assert Run(stale.path).params == before


def test_stale_is_made_again_and_nothing_lost(stale):
    files = {p.name: p.read_bytes() for p in stale.path.iterdir() if p.name != ".lock"}
    run = fit(one, stale.path.parent/"run", stale="rerun")
    assert run.path == stale.path and run.params["sources"]["toy:Net"] != "another"
    old, = stale.path.parent.glob("*.stale-*")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == files
    assert fit(one, stale.path.parent/"run").complete


def test_stale_option_is_checked(tmp_path):
    with pytest.raises(ValueError, match="stale='yes'; expected refuse, rerun or keep"):
        fit(one, tmp_path/"run", stale="yes")


# runs and networks as values
def test_another_teacher_on_resume(tmp_path):
    first, second = (replace(toy.distil, steps=2, epochs=None,
                             teacher=partial(toy.teacher, seed)) for seed in (1, 2))
    assert fit(first, tmp_path/"run").path != fit(second, tmp_path/"run").path
    Trainer(first, toy.squares(), tmp_path).fit()
    with pytest.raises(ValueError, match="was trained with the teacher .* use the same weights"):
        Trainer(second, toy.squares(), tmp_path).fit()


def test_run_as_start_teacher_and_argument(tmp_path):
    start = fit(replace(toy.alone, epochs=2), tmp_path/"start")
    recipe = replace(one, student=start, teacher=start, lr=1e-9,
                     terms=(Seg, KD, partial(toy.Assisted, assistant=start)),
                     weights=dict(seg=1, kd=1, assisted=1))
    run = fit(recipe, tmp_path/"run")
    for name, tensor in start.network().state_dict().items():
        assert torch.allclose(tensor, run.network().state_dict()[name], atol=1e-6)
    assert run.metrics("train")[0]["losses"]["assisted"] == pytest.approx(0, abs=1e-12)
    assert run.params["recipe"]["teacher"] == {"run": os.path.join("..", start.path.name),
                                               "sha256": start.sha256}
    assert weights_sha256(start.network()) == start.sha256
    moved = tmp_path/"elsewhere"
    start.path.rename(moved)
    again = replace(recipe, student=Run(moved, bare), teacher=Run(moved, bare),
                    terms=(Seg, KD, partial(toy.Assisted, assistant=Run(moved, bare))))
    assert fit(again, tmp_path/"run").path == run.path


def test_teacher_of_a_finished_run_is_read_once(tmp_path, monkeypatch):
    import medkd.trainers.run as module
    start = fit(replace(toy.alone, epochs=1), tmp_path/"start")
    recipe = replace(one, teacher=start, terms=(Seg, KD), weights=dict(seg=1, kd=1))
    run = fit(recipe, tmp_path/"run")
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_file", None)
        patched.setattr(module.inspect, "getsource", None)
        assert fit(recipe, tmp_path/"run").path == run.path
    save_weights(start.path/"best.safetensors", bare())
    assert fit(recipe, tmp_path/"run").path != run.path


def test_unfinished_run_is_no_teacher(tmp_path):
    with toy.stopping_after(2), pytest.raises(KeyboardInterrupt): fit(toy.alone, tmp_path/"run")
    with pytest.raises(RuntimeError, match="is unfinished; fit the same recipe again"):
        fit(replace(toy.distil, teacher=Run(toy.only_run(tmp_path), toy.Net)), tmp_path/"student")


@pytest.mark.parametrize("prepare", [lambda net: net, freeze])
def test_network_as_student_is_copied(tmp_path, prepare):
    net = prepare(toy.Net())
    before = weights_sha256(net)
    run = fit(replace(one, student=net, lr=.1), tmp_path/"run")
    assert weights_sha256(net) == before != run.sha256
    with pytest.raises(TypeError, match="toy:Net was given as an object and is not stored"):
        Run(run.path, allow=("toy",)).network()


def test_layers_frozen_by_the_maker_stay(tmp_path):
    recipe = replace(one, student=half_frozen, lr=.1)
    before, after = half_frozen().state_dict(), fit(recipe, tmp_path/"run").network().state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("down"))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def half_frozen():
    torch.manual_seed(0)
    net = bare()
    net.down.requires_grad_(False)
    return net


def test_weights_given_by_file_count_by_content(tmp_path):
    for folder in ("a", "b"):
        (tmp_path/folder).mkdir()
        save_weights(tmp_path/folder/"w.safetensors", toy.teacher())
    save_weights(tmp_path/"c.safetensors", toy.teacher(3))
    def loaded(path):
        return replace(one, student=partial(load_network, partial(toy.Net, 8), str(tmp_path/path)))
    first, second, third = (named(loaded(path)) for path in ("a/w.safetensors", "b/w.safetensors",
                                                             "c.safetensors"))
    assert first == second != third
    run = fit(loaded("a/w.safetensors"), tmp_path/"run")
    assert Run(run.path, allow=("toy", "medkd")).sha256 == run.sha256


def test_provenance(tmp_path):
    env = fit(one, tmp_path/"run").env
    assert set(env) >= {"versions", "git", "device", "data", "argv", "threads", "processes",
                        "started"}
    assert env["versions"]["torch"] == torch.__version__
    assert env["data"] == dict(name="squares", sha256=toy.squares().sha256, phantom=False)
    assert str(tmp_path) not in str(env)


def test_log_is_complete(tmp_path):
    run = fit(toy.everything, tmp_path/"run")
    assert [row["step"] for row in run.metrics("train")] == list(range(8))
    assert [row["step"] for row in run.metrics("val")] == [2, 4, 6, 8]
    assert all(set(row["losses"]) == set(toy.everything.weights) for row in run.metrics("train"))
    assert run.report["best"] == max(row["scores"]["dice"] for row in run.metrics("val"))
    assert set(read_json(run.path/"wiring.json")) == {*toy.everything.weights, "unreached"}
