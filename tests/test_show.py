"Figures in a notebook: each appears once, as a picture; nothing global changes; the panel outlives its kernel and keeps its memory."
import subprocess
import sys
import tracemalloc
from io import BytesIO

import numpy as np
import nbformat
import pytest
import torch

NAMES = ("paint", "pictures", "plots", "tables", "panel", "controls", "viewer", "show")
SETUP = """
import numpy as np, torch
from medkd.show import threshold_panel
from medkd.plots import show_cost, show_curves, show_scores, show_share
from medkd.show import pick_cases, show_batch, show_results, show_taps
from medkd.tables import compare_table, score_table
rng = np.random.default_rng(0)
y, x = np.mgrid[:60, :90]
label = abs(y - 30 - 15 * np.sin(x / 9)) < 2
items = [dict(image=torch.rand(3, 60, 90), label=torch.tensor(label).long(), fov=torch.tensor(x > 20), case=f"eye{i}") for i in range(4)]
predictions = {m: {i["case"]: np.clip(label + rng.normal(0, .3, label.shape), 0, 1) for i in items} for m in ("teacher", "student", "kd")}
run = [dict(kind="train", step=i, epoch=i / 10, losses=dict(seg=1 / (i + 1), kd=-.1), weights=dict(seg=1., kd=2.)) for i in range(30)]
run += [dict(kind="val", step=10 * e, epoch=e, scores=dict(dice=.1 * e)) for e in (1, 2, 3)]
rows = [dict(method=m, dataset=d, case=i, metric="dice", value=rng.uniform(.6, .8)) for m in predictions for d in ("a", "b") for i in range(5)]
taps = dict(e1=torch.rand(1, 4, 30, 45)), dict(e1=torch.rand(1, 8, 30, 45), e2=torch.rand(1, 8, 15, 22))
cost = [{"method": m, "dice": .7, "MACs (G)": g} for m, g in dict(teacher=90., student=9., kd=9.).items()]
"""
FIGURES = (
    "show_batch(items)", "show_results(items, predictions, cases=pick_cases(dict(eye0=.7, eye1=.5)))",
    "show_results(items, predictions, crop=(10, 20, 30, 40))", "show_curves(dict(teacher=run, kd=run[:1]))", "show_share(run)",
    "show_scores(rows)", "show_cost(cost)", "show_taps(*taps)",
    "threshold_panel(items, predictions)")

@pytest.fixture(scope="module")
def world():
    names = {}
    exec(SETUP, names)
    return names

def test_importing_costs_no_plotting_library():
    "matplotlib, seaborn, pandas and ipywidgets are imported when something is drawn."
    code = (f"import sys, torch; before = set(sys.modules); {'; '.join(f'import medkd.{name}' for name in NAMES)};"
            "heavy = {'matplotlib', 'seaborn', 'pandas', 'ipywidgets', 'scipy', 'skimage', 'monai'};"
            "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)")
    subprocess.run([sys.executable, "-c", code], check=True)

def test_every_figure_stands_in_the_notebook_once(tmp_path):
    "A run of papermill ends with one image/png per cell, and the panel's controls after its picture."
    import papermill
    cells = ["%matplotlib inline", SETUP, *FIGURES]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(notebook, tmp_path/"in.ipynb")
    done = papermill.execute_notebook(str(tmp_path/"in.ipynb"), str(tmp_path/"out.ipynb"), progress_bar=False, execution_timeout=120)
    outputs = {cell.source: [out.get("data", {"text": out}) for out in cell.outputs] for cell in done.cells[2:]}
    assert {source: sum("image/png" in data for data in found) for source, found in outputs.items()} == dict.fromkeys(FIGURES, 1)
    for source, found in outputs.items(): # a picture alone, or a picture and then its controls
        below = [("image/png" in data, "application/vnd.jupyter.widget-view+json" in data) for data in found]
        moves = source.startswith(("show_batch", "show_results", "threshold_panel"))
        assert below == [(True, False), (False, True)][:1 + moves], source
    texts = [out.metadata.get("image/png", out.metadata).get("alt", "") for cell in done.cells[2:] for out in cell.outputs if "image/png" in out.get("data", {})]
    assert all(len(text) > 20 for text in texts), texts

@pytest.mark.parametrize("source", FIGURES)
def test_drawing_changes_nothing_global(world, source):
    "Settings, random numbers and pyplot's figures are as before; titles carry the note."
    import matplotlib.pyplot as plt
    settings, random, torch_random = dict(plt.rcParams), np.random.get_state()[1].copy(), torch.get_rng_state()
    figure = eval(source[:-1] + ", note='phantom data')", world)
    figure = getattr(figure, "figure", figure)
    figure.canvas.draw()
    assert "phantom data" in figure.get_suptitle() and plt.get_fignums() == []
    assert dict(plt.rcParams) == settings
    assert (np.random.get_state()[1] == random).all() and torch.equal(torch.get_rng_state(), torch_random)

@pytest.mark.parametrize("source", FIGURES)
def test_every_axis_has_a_name_and_no_title_overlaps(world, source):
    "Axes with ticks say what they show, and titles of neighbours stay apart."
    figure = eval(source, world)
    figure = getattr(figure, "figure", figure)
    figure.savefig(BytesIO())
    axes = [ax for ax in figure.axes if ax.get_visible()]
    assert all(ax.get_xlabel() for ax in axes if len(ax.get_xticks()) and ax.xaxis.get_tick_params()["labelbottom"])
    boxes = [ax.title.get_window_extent() for ax in axes if ax.get_title().strip()]
    assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]

def test_panel_reuses_its_figure(world):
    "Its moves draw into one array and keep no memory."
    panel = world["threshold_panel"](world["items"], world["predictions"])
    def sweep():
        for k in range(15): panel.threshold.value = .2 + .01 * k
    figure = panel.figure
    sweep()
    tracemalloc.start()
    sweep()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert panel.figure is figure and len(figure.axes) == 2 and kept < 2**20

def test_panel_scores_are_those_of_the_prediction(world):
    "What the slider shows is what scoring the thresholded prediction gives."
    from medkd.metrics import confusion
    panel = world["threshold_panel"](world["items"], world["predictions"])
    panel.case.value, panel.method.value, panel.threshold.value = "eye2", "kd", .25
    item = world["items"][2]
    exact = confusion(world["predictions"]["kd"]["eye2"] >= .25, item["label"], item["fov"]).scores()
    assert panel.scores.value == ", ".join(f"{name} {exact[name]:.3f}" for name in ("dice", "sensitivity", "specificity"))

def test_methods_without_a_test_case_are_named(world):
    with pytest.raises(KeyError, match="predictions of kd.*eye0"):
        world["show_results"](world["items"], dict(kd={}))

def test_tables_survive_missing_values(world):
    "A NaN case leaves its mean, its n and its pair out; a data set without the baseline has no p value."
    rows = world["rows"] + [dict(method="kd", dataset="b", case=9, metric="dice", value=float("nan")),
                            dict(method="kd", dataset="c", case=1, metric="dice", value=.5)]
    scores = world["score_table"](rows).set_index(["dataset", "method"])
    assert scores.loc[("b", "kd"), "n"] == 5 and scores.loc[("c", "kd"), "dice"] == "0.500"
    differences = world["compare_table"](rows).set_index(["dataset", "method"])
    assert differences.loc[("c", "kd"), "n"] == 0 and np.isnan(differences.loc[("c", "kd"), "p_holm"])
