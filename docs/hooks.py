"mkdocs-jupyter's page as one of Material: its own style sheets and scripts are left out, code cells look like any code."
import re
from collections import Counter
from html import escape

import nbformat

MISSING = 'alt="No description has been provided for this image"'
CODE = re.compile(r'<div class="highlight[^"]*">\s*<pre>(.*?)</pre>\s*</div>', re.S)
COPY = re.compile(r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>|<div[^>]*clipboard-copy-txt[^>]*>.*?</div>', re.S)


def descriptions(notebook):
    "Of the pictures among the outputs, in their order: nbconvert has no place for them."
    for output in (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs):
        kinds = [kind for kind in ("image/png", "image/jpeg") if kind in output.get("data", {})]
        if kinds and not {"text/html", "image/svg+xml"} & {*output["data"]}: yield output["metadata"][kinds[0]]["alt"]


def numbered(html):
    "Headings that are called the same, told apart as the table of contents does."
    seen = Counter()
    def number(match):
        seen[match[2]] += 1
        return match[1] + match[2] + (f"_{seen[match[2]] - 1}" if seen[match[2]] > 1 else "")
    return re.sub(r'(<h[1-6][^>]* id=")([^"]+)', number, html)


def on_page_content(html, page, **_):
    if not page.file.src_path.endswith(".ipynb"): return html
    body = html[html.index('<div class="jupyter-wrapper">'):html.rindex("<!-- jupyter-wrapper -->")]
    for about in descriptions(nbformat.read(page.file.abs_src_path, 4)): body = body.replace(MISSING, f'alt="{escape(about)}"', 1)
    return numbered(CODE.sub(r'<div class="highlight"><pre><code>\1</code></pre></div>', COPY.sub("", body)))
