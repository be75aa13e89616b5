"""JupyterLab in a real browser: the start page and a paper run as they stand, every control changes what is shown, a run is continued and stopped.
Screenshots go to out/ui. Run by `make test-ui`; phantoms only."""
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from lab import CHROMIUM, Notebook, changed, jupyterlab, state

ROOT = Path(__file__).parent.parent.parent
SHOTS = ROOT/"out"/"ui"
NOTEBOOKS = {"start": ("nbs/start.ipynb", {}), "gkd": ("papers/gkd.ipynb", dict(preset="smoke", methods="gkd", runs="runs"))}
# in the order of the page: what is called, and the kinds of controls that have to follow
PANELS = {"start": [("show_batch(", {"dropdown", "slider"}), ("explore_data(", {"dropdown", "list", "checkbox", "slider"}), ("live_panel(", {"dropdown"}),
                    ("show_results(", {"dropdown", "slider"}), ("compare_panel(", {"dropdown", "list"}), ("tap_explorer(", {"dropdown", "slider", "tree"}),
                    ("vector_panel(", {"dropdown", "slider", "point"}), ("explore_data(", {"dropdown", "list", "slider"}), ("show_results(", {"dropdown", "slider"})],
          "gkd": [("threshold_panel(", {"dropdown", "slider"})]}
# dropdowns after what they fill or switch off
KINDS = dict(slider=".noUi-handle", list=":is(.widget-select, .widget-select-multiple) select", checkbox="input[type=checkbox]", tree="details > summary",
             point=".medkd-point circle", dropdown=".widget-dropdown select")
FEW = dict(tree=2, point=1) # of so many
WIDGET = "application/vnd.jupyter.widget-view+json"
STOPPED = """import threading, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import toy
from medkd.live import live_panel, stop_run
from medkd.trainers import fit

def ask():
    while not (logs := [*Path("runs").glob("live-*/metrics.jsonl")]): time.sleep(.05)
    stop_run(logs[0].parent)

threading.Thread(target=ask, daemon=True).start()
try: fit(replace(toy.alone, data=partial(toy.squares, toy.Slow), epochs=None, steps=5000), "runs/live")
except KeyboardInterrupt: pass
live_panel("runs")"""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="!!! NO BROWSER TESTS: chromium is not here and could not be installed")


@pytest.fixture
def served(tmp_path):
    "Address and token of a JupyterLab on copies of the notebooks, and their folder."
    folder, home = tmp_path/"work", tmp_path/"home"
    for path, parameters in NOTEBOOKS.values(): copy(ROOT/path, folder/path, parameters)
    home.mkdir()
    SHOTS.mkdir(parents=True, exist_ok=True)
    with jupyterlab(folder, home) as lab: yield *lab, folder


def copy(source, target, parameters):
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    target.parent.mkdir(parents=True, exist_ok=True)
    if parameters: nbformat.write(parameterize_notebook(load_notebook_node(str(source)), parameters), target)
    else: shutil.copy(source, target)


def move(control, kind):
    "Give the control another value; False when it has no other."
    if kind == "slider":
        control.focus()
        at = lambda: [control.get_attribute(name) for name in ("aria-valuenow", "aria-valuetext")] # rounded, each in its way
        before = at()
        for _ in range(3): control.press("ArrowRight")
        if at() == before:
            for _ in range(3): control.press("ArrowLeft")
        return at() != before
    if kind in ("dropdown", "list"):
        options, now = control.locator("option").all_inner_texts(), control.evaluate("c => c.selectedIndex")
        if len(options) > 1: control.select_option(index=(now + 1) % len(options))
        return len(options) > 1
    if kind == "point": control.hover(force=True)
    else: control.click()
    return True


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, served, page):
    notebook = Notebook(page, *served[:2], NOTEBOOKS[name][0])
    page.screenshot(path=SHOTS/f"{name}_opened.png")
    outputs, sources = notebook.run_all(420), notebook.sources()
    errors = [output for cell in outputs for output in cell if output["output_type"] == "error"]
    assert not errors, json.dumps(errors)[:2000]
    panels = [i for i, cell in enumerate(outputs) if any(WIDGET in output.get("data", {}) for output in cell)]
    assert len(panels) == len(PANELS[name]) and all(call in sources[i] for i, (call, _) in zip(panels, PANELS[name]))
    for i in panels: assert any("image/png" in output.get("data", {}) for output in outputs[i]), f"no picture below {sources[i]}"
    for theme in ("light", "dark"):
        notebook.theme(f"JupyterLab {theme.title()}")
        for number, i in enumerate(panels): notebook.cell(i).screenshot(path=SHOTS/f"{name}_{number}_{theme}.png")
    faults, followed = [], {}
    for number, (i, (call, kinds)) in enumerate(zip(panels, PANELS[name])):
        cell = notebook.cell(i)
        found = move_controls(cell)
        cell.screenshot(path=SHOTS/f"{name}_{number}_moved.png")
        where = f"{number}, {call}...)"
        faults += [f"{where}: {kind} {k} changes nothing" for kind, k, change in found if change is None]
        faults += [f"{where}: there is no {kind} to move" for kind in kinds - {kind for kind, *_ in found}]
        if not any(change == "picture" for *_, change in found): faults.append(f"{where}: no picture changed")
        for kind, _, change in found: followed.setdefault(kind, set()).add(change)
    faults += [f"no picture followed any {kind}" for kind, changes in followed.items() if kind not in FEW and "picture" not in changes]
    faults += notebook.errors()
    assert not faults, "\n".join(faults)


def move_controls(cell):
    """Move every control of a cell (buttons, which act on runs, are left alone): kind, which one, and whether a "picture" or only a "text"
    changed, or nothing (None)."""
    found = []
    for kind, selector in KINDS.items():
        for i in range(cell.locator(f".jupyter-widgets {selector}").count())[:FEW.get(kind)]:
            control = cell.locator(f".jupyter-widgets {selector}").nth(i)
            if not control.is_visible() or not control.is_enabled(): continue
            before = state(cell)
            if not move(control, kind): continue
            after = changed(cell, before)
            found.append((kind, i, after and ("picture" if after["pictures"] != before["pictures"] else "text")))
    return found


def test_run_is_continued_and_stopped(served, page):
    "A run that stopped is continued in a process of its own, followed while it trains, and stopped again."
    from playwright.sync_api import expect
    cells = [nbformat.v4.new_code_cell("%matplotlib inline"), nbformat.v4.new_code_cell(STOPPED)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3"))), served[2]/"live.ipynb")
    notebook = Notebook(page, *served[:2], "live.ipynb")
    errors = [output for cell in notebook.run_all(120) for output in cell if output["output_type"] == "error"]
    assert not errors, json.dumps(errors)[:2000]
    cell = notebook.cell(1)
    line = cell.locator(".widget-html", has_text="live-")
    expect(line).to_contain_text("stopped, its checkpoint is written", timeout=30_000)
    before = state(cell)
    cell.get_by_role("button", name="continue").click()
    expect(line).to_contain_text("left", timeout=90_000)
    cell.screenshot(path=SHOTS/"live_continued.png")
    assert state(cell)["pictures"] != before["pictures"]
    cell.get_by_role("button", name="stop").click()
    expect(line).to_contain_text("stopped, its checkpoint is written", timeout=60_000)
    assert not notebook.errors()
