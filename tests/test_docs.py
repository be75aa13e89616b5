"The site's own code: pages from notebooks, the API, faults found. The site itself is built by `make docs`."
import importlib
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/"docs"))
import api  # noqa: E402
import check  # noqa: E402
import pages  # noqa: E402


def test_api_of_a_module():
    import medkd.losses.logits as module
    text = api.page("medkd.losses.logits", "../../nbs/losses/02_logits.ipynb")
    for name in module.__all__: assert f"## {name} {{ #{name} }}" in text, name
    assert "kd_kl(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor" in text
    assert "| `tau` | `float` | `1.0` | temperature |" in text
    assert r"| `student` | `Tensor` |  | (B,K,\*S) logits |" in text
    assert "(../../nbs/losses/02_logits.ipynb#def-kd_kl), line " in text


def test_every_exported_name_has_an_entry():
    found = [pages.module_name(nbformat.read(path, 4)) for path in sorted((ROOT/"nbs").rglob("*.ipynb"))]
    for module in filter(None, found):
        module = importlib.import_module(module)
        missing = set(module.__all__) - set(api.definitions(module)) - set(api.borrowed(module))
        assert not missing, (module.__name__, missing)


def test_cells_of_a_page():
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    picture = nbformat.v4.new_output("display_data", {"image/png": "x"})
    controls = nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}})
    printed = nbformat.v4.new_output("stream", name="stdout", text=f"{ROOT}/out/table.md")
    notebook = nbformat.v4.new_notebook(cells=[
        text("# Title\nWhat it is."), code("#| default_exp x"), code("#| hide\nimport secret"), code("#| export\ndef made(): pass"),
        text("Two curves. More."), code("draw()", outputs=[picture, controls, printed])])
    page = pages.page(notebook, ["made"], str, lambda names: f"API {names}")
    assert [cell.source for cell in page.cells] == ["# Title\nWhat it is.", "API ['made']", "def made(): pass", "Two curves. More.", "draw()"]
    drawn, told = page.cells[-1].outputs
    assert drawn.metadata["image/png"]["alt"] == "Figure, Title: Two curves." and told.text == "out/table.md"


@pytest.mark.parametrize("page, fault", [
    ('<a href="gone.html">x</a>', "no such file: gone.html"), ('<a href="b.html#gone">x</a>', "no such place: b.html#gone"),
    ('<img src="a.png">', "picture without description"), ('<script src="https://cdn.example.org/x.js"></script>', "<script> from outside"),
    ('<link href="//fonts.example.org/x.css">', "<link> from outside"), ('<a href="b.html#here">x</a><a href="https://doi.org/1">y</a>', None)])
def test_faults(tmp_path, page, fault):
    (tmp_path/"a.png").write_bytes(b"")
    (tmp_path/"a.html").write_text(page)
    (tmp_path/"b.html").write_text('<p id="here"></p>')
    found = [*check.faults(tmp_path)]
    assert len(found) == bool(fault) and (not fault or fault in found[0])


def test_fonts_from_outside_are_a_fault(tmp_path):
    (tmp_path/"a.css").write_text("@import url('https://fonts.example.org/x.css');")
    assert "from outside" in [*check.faults(tmp_path)][0]
