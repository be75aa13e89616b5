"Notebooks as pages: executed once for each state of notebook and package, then without directives and hidden cells."
import ast
import copy
import hashlib
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = re.compile(r"^#\| *(eval: *false|notest|slow)", re.M)
FIRST = re.compile(r"^\s*(?:[#>]+ *)?(.+?[.:!?](?=\s|$)|.+$)", re.M)


def code_state():
    "Hash of the package: an executed notebook is as old as it."
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("medkd/**/*.py"))))


def shows(notebook):
    "Whether a cell that a reader sees prints something or ends in a value."
    for cell, exported in visible(copy.deepcopy(notebook)):
        if cell.cell_type == "code" and not exported:
            last = ast.parse(re.sub("^%.*", "", cell.source, flags=re.M)).body[-1:]
            called = ast.unparse(last[0].value) if last and isinstance(last[0], ast.Expr) else ""
            if re.search(r"\b(print|display)\(", cell.source) or (called and not re.match(r"(test|check)_|[\w.]*(assert|seed|remove|rmtree)", called)): return True
    return False


def executed(path, kept, **parameters):
    "The notebook with its outputs, run beside itself on phantoms alone; `kept` holds what was run before."
    key = code_state()
    key.update(path.read_bytes() + repr(parameters).encode())
    stored = kept/f"{path.stem}-{key.hexdigest()[:16]}.ipynb"
    if not stored.exists():
        notebook = nbformat.read(path, 4) if not parameters else parameterize_notebook(load_notebook_node(str(path)), parameters)
        for cell in notebook.cells:
            if SKIPPED.search(cell.source): cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
        notebook.cells.insert(0, nbformat.v4.new_code_cell("#| hide\n%matplotlib inline"))
        folder = path.parent if not parameters else ROOT
        NotebookClient(notebook, timeout=900, kernel_name="python3", extra_arguments=["--IPKernelApp.log_level=40"], resources=dict(metadata=dict(path=str(folder)))).execute()
        kept.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, stored.with_suffix(".tmp"))
        stored.with_suffix(".tmp").rename(stored)
    return nbformat.read(stored, 4)


def title(notebook):
    "Its first heading and the first line below, or a description in its quotation."
    lines = [line.strip() for line in notebook.cells[0].source.splitlines() if line.strip()]
    return lines[0].lstrip("# "), next((line.lstrip("> ") for line in lines[1:]), "")


def module_name(notebook):
    "The module that the notebook is exported to, if any."
    found = re.search(r"^#\| *default_exp +(\S+)", "\n".join(c.source for c in notebook.cells if c.cell_type == "code"), re.M)
    return found and ("medkd." + found[1]).removesuffix(".__init__")


def visible(notebook):
    "Cells that a reader sees, directives taken off."
    for cell in notebook.cells:
        if re.match(r"#\| *hide", cell.source) or "injected-parameters" in cell.metadata.get("tags", []): continue
        exported = bool(re.match(r"#\| *export", cell.source))
        if cell.cell_type == "code": cell.source = re.sub(r"^(#\|.*|%matplotlib.*)\n?", "", cell.source, flags=re.M).strip("\n")
        if cell.source: yield cell, exported


def clean(text):
    "Folders of this machine taken out of what was printed."
    return text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


def shown(outputs, about):
    "Outputs for a page: no progress or warnings, no controls (they need a kernel), every picture described."
    for output in outputs:
        data = output.get("data", {})
        if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in data: continue
        if "text" in output: output.text = clean(output.text)
        for kind in ("text/plain", "text/html"):
            if kind in data: data[kind] = clean(data[kind])
        for kind in data:
            if kind.startswith("image/"): output.setdefault("metadata", {}).setdefault(kind, {}).setdefault("alt", about)
        yield output


def described(source, heading, before):
    "What stands in a picture: its title in the code, else the sentence before it."
    named = re.search(r"title=f?\"([^\"{]+)\"", source)
    first = FIRST.search(before)
    about = named[1] if named else first[1] if first else ""
    return re.sub(r"[`$*\\]", "", f"Figure, {heading}: {about}" if about and about != heading else f"Figure, {heading}")


def page(notebook, definitions, rewrite, anchor):
    "The notebook of a page: rewrite(markdown) makes links and formulas, anchor(name) the line above an exported name."
    cells, heading, before = [], "", ""
    for cell, exported in visible(notebook):
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ +(.+)$", cell.source, re.M)
            heading, before = headings[-1] if headings else heading, re.sub(r"^#+ .*$", "", cell.source, flags=re.M)
            cell.source = rewrite(cell.source)
        else:
            cell.outputs = [*shown(cell.outputs, described(cell.source, heading, before))]
            names = [name for name in definitions if re.search(rf"^(?:def |class |){re.escape(name)}\b", cell.source, re.M)] if exported else []
            cells += [nbformat.v4.new_markdown_cell(anchor(names), id=f"api-{names[0]}")] if names else []
        cell.metadata = nbformat.NotebookNode()
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata.pop("widgets", None)
    return notebook
