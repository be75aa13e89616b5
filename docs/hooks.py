"mkdocs-jupyter's page as one of Material: its own style sheets and scripts are left out, code cells look like any code."
import re

CODE = re.compile(r'<div class="highlight[^"]*">\s*<pre>(.*?)</pre>\s*</div>', re.S)
COPY = re.compile(r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>|<div[^>]*clipboard-copy-txt[^>]*>.*?</div>', re.S)


def on_page_content(html, page, **_):
    if not page.file.src_path.endswith(".ipynb"): return html
    body = html[html.index('<div class="jupyter-wrapper">'):html.rindex("<!-- jupyter-wrapper -->")]
    return CODE.sub(r'<div class="highlight"><pre><code>\1</code></pre></div>', COPY.sub("", body))
