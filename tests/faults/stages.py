"""Every stage of the paper notebooks in smoke: what `fit` is called with, and the run nothing disturbed.

Only the statements of a notebook that its trainings depend on are run, on twins of a few small cases.
"""
import ast
import dis
import time
from dataclasses import dataclass
from pathlib import Path

import notebooks

import medkd.trainers
from medkd.data import phantom
from medkd.trainers import Recipe

SECTIONS = (*(f"train_{k:04d}" for k in range(4)), *(f"test_{k:04d}" for k in range(2)))
FUNDI = ("Image_01L", "Image_01R", "Image_02L", "Image_10L", "Image_11L")
KIDNEYS = tuple(f"case_{k:05d}" for k in (1, 2, 5, 0, 6, 17))
HEARTS = ("patient001", "patient003", "patient002", "patient004")
ORGANS = ("0001", "0002", "0032", "0035")
PAPERS = dict( # paper -> (phantom, its cases, their size, parameters beside preset="smoke")
    gkd=("chasedb1", FUNDI, (140, 140), dict(dim=32)),
    graph_flow=("gastric", SECTIONS, (64, 64), {}),
    acf_bckd=("btcv", ORGANS, (24, 40, 40), dict(ablation=True)),
    sikd=("acdc", HEARTS, (3, 48, 40), {}),
    hlfd=("kits19", KIDNEYS, (4, 64, 64), {}))


@dataclass(frozen=True)
class Stage:
    "A call of `fit`, and the folder of the run that it made undisturbed."
    paper: str
    name: str
    recipe: Recipe
    reference: Path
    seconds: float = 0.


def needed(sources):
    "Of a notebook's statements its parameters, those that train, and what they depend on, in order."
    plain = ["\n".join(line for line in s.splitlines() if not line.startswith("%")) for s in sources]
    body = [(statement, source.startswith("# Parameters")) for source in plain for statement in ast.parse(source).body]
    kept = {i for i, (statement, given) in enumerate(body)
            if given or isinstance(statement, ast.AnnAssign) or {"train", "fit"} & called(statement)}
    body = [statement for statement, _ in body]
    while True:
        names = {name for i in kept for name in loaded(body[i])}
        more = kept | {i for i, statement in enumerate(body) if names & stored(statement)}
        if more == kept: return [body[i] for i in sorted(kept)]
        kept = more


def called(statement):
    return {node.func.id for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def instructions(code):
    yield from dis.get_instructions(code)
    for part in code.co_consts:
        if hasattr(part, "co_code"): yield from instructions(part)


def named(statement, *operations):
    code = compile(ast.Module([statement], []), "", "exec")
    return {i.argval for i in instructions(code) if i.opname in operations}


def loaded(statement):
    "Names of the notebook that a statement reads and does not make itself, in its functions, too."
    return named(statement, "LOAD_NAME", "LOAD_GLOBAL") - named(statement, "STORE_NAME")


def stored(statement):
    "Names that a statement gives a value, what its loops count with apart, or changes a part of."
    turns = {name.id for node in ast.walk(statement) if isinstance(node, ast.For)
             for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    parts = [base(target) for node in ast.walk(statement) if isinstance(node, ast.Assign) for target in flat(node.targets)]
    parts += [base(node.target) for node in ast.walk(statement) if isinstance(node, ast.AugAssign)]
    return named(statement, "STORE_NAME") - turns | {name for name in parts if name in loaded(statement)}


def flat(targets):
    for target in targets:
        if isinstance(target, (ast.Tuple, ast.List)): yield from flat(target.elts)
        else: yield target


def base(target):
    while isinstance(target, (ast.Subscript, ast.Attribute, ast.Starred)): target = target.value
    return getattr(target, "id", "")


def run_stages(paper, root, workers=2, **parameters):
    """Train every stage of a paper under `root` undisturbed: the stages, each of which a process
    forked from this one can train again."""
    twin, cases, size, more = PAPERS[paper]
    phantom(twin, root/"twins", list(cases), size)
    stages, train = [], medkd.trainers.fit
    def recording(recipe, run_dir, **options):
        started = time.monotonic()
        run = train(recipe, run_dir, save_every=0, **options)
        if run.path not in [stage.reference for stage in stages]:
            stages.append(Stage(paper, Path(run_dir).name, recipe, run.path,
                                time.monotonic() - started))
        return run
    given = dict(preset="smoke", precision="fp32", workers=workers, data_root=str(root/"twins"),
                 runs=str(root/"runs"), **more | parameters)
    medkd.trainers.fit = recording
    try:
        body = needed(notebooks.cell_sources(notebooks.PAPERS/f"{paper}.ipynb", **given))
        exec(compile(ast.Module(body, []), f"<{paper}>", "exec"), dict(In=[""]))
    finally: medkd.trainers.fit = train
    return stages
