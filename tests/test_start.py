"The start page: `make lab` opens it, its cells compile, and what they import is there. The browser test runs all of them."
import ast
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
CELLS = [cell.source for cell in nbformat.read(ROOT/"nbs"/"start.ipynb", 4).cells if cell.cell_type == "code"]


def test_make_lab_opens_it_on_loopback_only():
    lines = (ROOT/"Makefile").read_text().split("\nlab:")[1].splitlines()[1]
    assert "nbs/start.ipynb" in lines and "--ip=127.0.0.1" in lines


def test_its_imports_are_there():
    trees = [ast.parse(cell.replace("%matplotlib inline", "")) for cell in CELLS]
    imports = [node for tree in trees for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), "start.ipynb", "exec"), {})


def test_it_shows_every_panel():
    source = "\n".join(CELLS)
    for name in ("show_batch", "explore_data", "live_panel", "show_results", "compare_panel", "tap_explorer", "vector_panel"):
        assert f"{name}(" in source
