"""build.py [SITE] [--plain]: the site of documentation in SITE (_docs). Notebooks are executed, papers with the preset smoke; a result is kept in
out/docs until notebook or package change. --plain: nothing is executed, pages have no outputs."""
import argparse
import importlib
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import api
import nbformat
import pages
from check import faults
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pages import ROOT
from text import rich

OUT, STAGE = ROOT/"out"/"docs", ROOT/"out"/"docs"/"pages"
PARTS = {"": "Core", "data": "Data", "models": "Models", "losses": "Losses", "trainers": "Trainers"}
FILES = {"SECURITY.md": "Security", "CONTRIBUTING.md": "Contributing"}
NOTE = dict(nbs="Executed when this site was built, on generated data.",
            papers="Executed when this site was built with the preset `smoke`: a few steps on phantoms. It shows that everything runs and what every step gives; "
                   "its numbers and pictures say nothing about the methods. Numbers of real runs: [Results](results).",
            plain="Not executed: pictures and tables are left out.")
ABOUT = dict(curves="Losses and scores over the steps of training", share="Share of each term in the loss over the steps", scores="Scores of every case and method with means and intervals",
             cost="Dice against cost of the networks", overlays="Errors of the methods on the worst, median and best case", samples="Predictions of every method on two samples",
             examples="Images with their annotations", training="Augmented images the networks are trained on", views="The four augmented views of an image", tsne="Semantic vectors in two dimensions, coloured by view",
             attention="Attention maps of teacher and student on one image", ablation="Scores of the parts of the method", few="Dice against the share of labelled images")


class Site:
    "`sources`: notebook -> its staged page; `modules`: module -> notebook; `defined`: module -> names; `names`: those that no other thing is called -> module."
    def __init__(self, execute):
        self.execute = execute
        found = [path for folder in ("nbs", "papers") for path in sorted((ROOT/folder).rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
        self.sources = {path: Path("index.ipynb") if path.name == "index.ipynb" else path.relative_to(ROOT) for path in found}
        clean = {path: nbformat.read(path, 4) for path in found}
        self.titles = {path: pages.title(notebook) for path, notebook in clean.items()}
        self.modules = {name: path for path, notebook in clean.items() if (name := pages.module_name(notebook))}
        self.defined = {name: [*api.definitions(importlib.import_module(name))] for name in sorted(self.modules)}
        every = [name for names in self.defined.values() for name in names]
        self.names = {name: module for module, names in self.defined.items() for name in names if every.count(name) == 1 and re.search("[A-Z_]", name)}

    def api_page(self, module): return Path("api", *module.split(".")[1:] or ["medkd"]).with_suffix(".md")

    def place(self, target, base):
        "Page of a linked file or folder of the repository, None where the site has none. ValueError for one that is not there."
        path, _, fragment = target.partition("#")
        file = (base/path).resolve()
        if not file.exists(): raise ValueError(f"link to {target}: no such file")
        known = self.sources | {ROOT/name: Path(name.lower()) for name in FILES} | {ROOT/"papers/results": Path("results/index.md"), ROOT/"papers/results/README.md": Path("results/index.md")}
        page = known.get(file) or (file.relative_to(ROOT)/"index.md" if file.is_dir() and file.relative_to(ROOT).parts[0] in ("nbs", "papers") else None)
        return page and page.as_posix() + (f"#{fragment}" if fragment else "")

    def rewrite(self, text, page, base, module=None):
        "Formulas and links of a page's markdown, in a notebook to what becomes of the files; names of the page's own module are links, too."
        def to(place): return "../" * (len(page.parts) - 1) + (place if page.suffix == ".md" else re.sub(r"\.(md|ipynb)(?=#|$)", ".html", place))
        def link(target):
            found = "results/index.md" if target == "results" else self.place(target, base)
            return found and to(found)
        known = self.names | dict.fromkeys(self.defined.get(module, []), module)
        return rich(text, {name: to(f"{self.api_page(at).as_posix()}#{name}") for name, at in known.items()}, link)

    def write(self, page, text):
        file = STAGE/page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return page.as_posix()

    def notebook(self, path):
        "Stage one notebook."
        page = self.sources[path]
        kind = page.parts[0] if page.parts[0] == "papers" else "nbs"
        parameters = dict(preset="smoke", runs=str(OUT/"runs"/path.stem)) if kind == "papers" else {}
        notebook = nbformat.read(path, 4)
        filled = kind == "papers" or pages.shows(notebook)
        if filled and self.execute: notebook = pages.executed(path, OUT/"executed", **parameters)
        module, up = pages.module_name(notebook), "../" * (len(page.parts) - 1)
        def anchor(names):
            where = up + self.api_page(module).with_suffix(".html").as_posix()
            return '<p class="made">' + " · ".join(f'<a id="def-{name}" href="{where}#{name}">API: {name}</a>' for name in names) + "</p>"
        base = ROOT if page == Path("index.ipynb") else path.parent
        notebook = pages.page(notebook, self.defined.get(module, []), partial(self.rewrite, page=page, base=base, module=module), anchor)
        note = self.rewrite(NOTE[kind if self.execute else "plain"], page, base)
        if filled: notebook.cells.insert(1, nbformat.v4.new_markdown_cell(f"*{note}*", id="note"))
        (STAGE/page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, STAGE/page)

    def folder(self, folder, name):
        "Its page of contents and its part of the navigation."
        listed = [path for path, page in self.sources.items() if page.parent == folder and page.name not in ("index.ipynb", "start.ipynb")]
        module = {path: name for name, path in self.modules.items()}
        rows = [f"| [{self.titles[path][0]}]({path.name}) | {self.rewrite(self.titles[path][1], folder/'index.md', path.parent)} | "
                + (f"[`{module[path]}`]({'../' * len(folder.parts)}{self.api_page(module[path])})" if path in module else "") + " |" for path in listed]
        index = self.write(folder/"index.md", "\n".join([f"# {name}", "", "| notebook | | module |", "|---|---|---|", *rows]) + "\n")
        return [index, *(self.sources[path].as_posix() for path in listed)]

    def api(self):
        "All pages of the API."
        contents = ["# API", "", "| module | names |", "|---|---|"]
        parts = {name: [] for name in PARTS}
        for module, path in sorted(self.modules.items()):
            if not importlib.import_module(module).__all__: continue
            page = self.api_page(module)
            text = api.page(module, "../" * (len(page.parts) - 1) + self.sources[path].as_posix())
            made = self.write(page, self.rewrite(text, page, (ROOT/page).parent, module))
            part = module.split(".")[1] if module.split(".")[1] in PARTS else ""
            parts[part].append({module: made})
            contents.append(f"| [`{module}`]({page.relative_to('api')}) | " + ", ".join(f"[{name}]({page.relative_to('api')}#{name})" for name in self.defined[module]) + " |")
        return [self.write(Path("api/index.md"), "\n".join(contents) + "\n"), *({PARTS[part]: made} for part, made in parts.items() if made)]

    def results(self):
        "Tables and figures of real runs, as they were committed."
        source, made = ROOT/"papers"/"results", []
        for folder in sorted(path.parent for path in source.glob("*/results.md")):
            shutil.copytree(folder/"figures", STAGE/"results"/folder.name/"figures", dirs_exist_ok=True)
            about = lambda match: f"![{ABOUT.get(re.split('[_.]', match[2])[0], match[2])} ({match[2].removesuffix('.png').replace('_', ' ')}, {folder.name.replace('_', ' ')})]({match[1]})"
            text = re.sub(r"^- (figures/(\S+))$", about, (folder/"results.md").read_text(), flags=re.M)
            made.append({folder.name.replace("_", " "): self.write(Path("results", folder.name, "index.md"), text)})
        listed = (source/"README.md").read_text()
        for folder in source.glob("*/results.md"): listed = listed.replace(f"`{folder.parent.name}`", f"[{folder.parent.name}]({folder.parent.name}/index.md)", 1)
        return [self.write(Path("results/index.md"), listed), *made]

    def navigation(self):
        "Everything but the notebooks, staged; the navigation."
        library = [self.folder(Path("nbs", part), name) if part else self.folder(Path("nbs"), "Library") for part, name in PARTS.items()]
        core, *parts = library
        nav = [{"Start": ["index.ipynb", "nbs/start.ipynb"]}, {"Papers": self.folder(Path("papers"), "Papers")}, {"Results": self.results()},
               {"Library": [core[0], {"Core": core[1:]}, *({name: part} for name, part in zip([*PARTS.values()][1:], parts))]}, {"API": self.api()}]
        others = [{name: self.write(Path(file.lower()), self.rewrite((ROOT/file).read_text(), Path(file.lower()), ROOT))} for file, name in FILES.items() if (ROOT/file).exists()]
        return nav + others


def main(site, execute):
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("traitlets").setLevel("ERROR") # nbconvert misses the pictures' descriptions, which the hook gives
    shutil.rmtree(STAGE, ignore_errors=True)
    os.environ |= dict(IN_TEST="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    for name in ("MEDKD_DATA", "MPLBACKEND"): os.environ.pop(name, None)
    made = Site(execute)
    nav = made.navigation()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if execute else 1) as pool: list(pool.map(made.notebook, made.sources))
    shutil.copy(ROOT/"docs"/"medkd.css", STAGE)
    build(load_config(str(ROOT/"docs"/"mkdocs.yml"), docs_dir=str(STAGE), site_dir=str(site), nav=nav, strict=True))
    if found := sorted(set(faults(site))): raise SystemExit("\n".join(found[:100]) + f"\n{len(found)} faults")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", nargs="?", default=ROOT/"_docs", type=Path)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    main(given.site.resolve(), not given.plain)
