"""JupyterLab in a real browser: the start page and a paper run as they stand, every control changes what is shown.
Screenshots go to out/ui. Run by `make test-ui`; phantoms only."""
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from lab import CHROMIUM, Notebook, changed, jupyterlab, state

ROOT = Path(__file__).parent.parent.parent
SHOTS = ROOT/"out"/"ui"
NOTEBOOKS = {"start": ("nbs/start.ipynb", {}), "gkd": ("papers/gkd.ipynb", dict(preset="smoke", methods="kd,gkd", runs="runs"))}
WIDGET = "application/vnd.jupyter.widget-view+json"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="!!! NO BROWSER TESTS: chromium is not here and could not be installed")


@pytest.fixture
def served(tmp_path):
    "JupyterLab on copies of the notebooks."
    folder, home = tmp_path/"work", tmp_path/"home"
    for path, parameters in NOTEBOOKS.values():
        if (ROOT/path).exists(): copy(ROOT/path, folder/path, parameters)
    home.mkdir()
    with jupyterlab(folder, home) as lab: yield lab


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
        at = lambda: control.get_attribute("aria-valuenow")
        before = at()
        for _ in range(3): control.press("ArrowRight")
        if at() == before:
            for _ in range(3): control.press("ArrowLeft")
        return at() != before
    if kind == "dropdown":
        options, now = control.locator("option").all_inner_texts(), control.evaluate("c => c.selectedIndex")
        if len(options) > 1: control.select_option(index=(now + 1) % len(options))
        return len(options) > 1
    if kind == "buttons":
        other = control.locator("button:not(.mod-active)").first
        if other.count(): other.click()
        return bool(other.count())
    control.click()
    return True


# buttons of a panel are pressed last: they act on runs
KINDS = dict(slider=".noUi-handle", dropdown="select", checkbox="input[type=checkbox]", buttons=".widget-toggle-buttons", button="button.jupyter-button:not(.widget-toggle-button)")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, served, page):
    path, _ = NOTEBOOKS[name]
    if not (ROOT/path).exists(): pytest.skip(f"{path} is not there")
    notebook = Notebook(page, *served, path)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f"{name}_opened.png")
    outputs = notebook.run_all(900)
    errors = [output for cell in outputs for output in cell if output["output_type"] == "error"]
    assert not errors, json.dumps(errors)[:2000]
    assert any("image/png" in output.get("data", {}) for cell in outputs for output in cell), "no picture"
    panels = [i for i, cell in enumerate(outputs) if any(WIDGET in output.get("data", {}) for output in cell)]
    assert panels, "no controls"
    moved, drawing = set(), set()
    for number, index in enumerate(panels):
        cell = notebook.cell(index)
        for theme in ("light", "dark"):
            notebook.theme(f"JupyterLab {theme.title()}")
            cell.screenshot(path=SHOTS/f"{name}_{number}_{theme}.png")
        found = controls_change(cell, f"{name}, controls {number}")
        moved, drawing = moved | found[0], drawing | found[1]
        cell.screenshot(path=SHOTS/f"{name}_{number}_moved.png")
    print(f"{name}: {len(panels)} groups of controls, moved: {sorted(moved)}, of which a picture followed: {sorted(drawing)}")
    assert {"slider", "dropdown"} <= moved and moved - {"button"} <= drawing


def controls_change(cell, where):
    "Move every control of a cell: each must change a picture or a text. The kinds that were moved, and those that changed a picture."
    kinds, drawing = set(), set()
    for kind, selector in KINDS.items():
        for i in range(cell.locator(f".jupyter-widgets {selector}").count()):
            control = cell.locator(f".jupyter-widgets {selector}").nth(i)
            if not control.is_visible() or not control.is_enabled(): continue
            before = state(cell)
            if not move(control, kind): continue
            after = changed(cell, before)
            assert after, f"{where}: {kind} {i} changes nothing"
            kinds.add(kind)
            if after["pictures"] != before["pictures"]: drawing.add(kind)
    assert drawing, f"{where}: no picture changed"
    return kinds, drawing
