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


KINDS = dict(slider=".noUi-handle", dropdown="select", checkbox="input[type=checkbox]", buttons=".widget-toggle-buttons")


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
    moved, faults = {}, []
    for number, index in enumerate(panels):
        cell = notebook.cell(index)
        for theme in ("light", "dark"):
            notebook.theme(f"JupyterLab {theme.title()}")
            cell.screenshot(path=SHOTS/f"{name}_{number}_{theme}.png")
        found = move_controls(cell)
        faults += [f"controls {number}: {kind} {i} changes nothing" for kind, i, change in found if change is None]
        if not any(change == "picture" for *_, change in found): faults.append(f"controls {number}: no picture changed")
        if not thumbnail_shows(cell): faults.append(f"controls {number}: no thumbnail")
        for kind, _, change in found: moved.setdefault(kind, set()).add(change)
        cell.screenshot(path=SHOTS/f"{name}_{number}_moved.png")
    print(f"{name}: {len(panels)} groups of controls; kinds and what followed: {moved}")
    faults += [f"no picture followed any {kind}" for kind, changes in moved.items() if "picture" not in changes]
    faults += notebook.errors()
    assert not faults, "\n".join(faults)
    assert {"slider", "dropdown"} <= {*moved}


def move_controls(cell):
    """Move every control of a cell (buttons, which act on runs, are left alone): kind, which one, and whether a "picture" or only a "text"
    changed, or nothing (None)."""
    found = []
    for kind, selector in KINDS.items():
        for i in range(cell.locator(f".jupyter-widgets {selector}").count()):
            control = cell.locator(f".jupyter-widgets {selector}").nth(i)
            if not control.is_visible() or not control.is_enabled(): continue
            before = state(cell)
            if not move(control, kind): continue
            after = changed(cell, before)
            found.append((kind, i, after and ("picture" if after["pictures"] != before["pictures"] else "text")))
    return found


def thumbnail_shows(cell):
    "Whether a point of a map of vectors, where there is one, shows its picture while the mouse is on it."
    points = cell.locator(".medkd-point circle")
    if not points.count(): return True
    points.first.hover(force=True)
    return any(more.is_visible() for more in cell.locator(".medkd-more").all())
