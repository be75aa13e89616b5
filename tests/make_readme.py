"README.md from nbs/index.ipynb: hidden cells and outputs left out, code fences marked as Python."
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter


def readme(root: Path) -> str:
    "The text of README.md."
    notebook = nbformat.read(root/"nbs"/"index.ipynb", 4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.outputs = []
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    return text.replace("\n\n\n", "\n\n").rstrip() + "\n"


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    (root/"README.md").write_text(readme(root))
