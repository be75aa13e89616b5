"""Paper notebooks as a user runs them: by papermill in a kernel of its own, or cell by cell in this process."""
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

PAPERS = Path(__file__).parent.parent/"papers"
GKD = PAPERS/"gkd.ipynb"


@dataclass
class Done:
    "What a run of papermill left behind."
    code: int
    text: str
    folder: Path

    @property
    def notebook(self): return nbformat.read(self.folder/"out.ipynb", 4)

    @property
    def cells(self): return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @property
    def error(self): return self.text.strip().splitlines()[-1]


def papermill(folder, *arguments, path=GKD, timeout=600, **environment):
    "Run a paper notebook in `folder`, as the command line does."
    command = [sys.executable, "-m", "papermill", str(path), "out.ipynb", "--no-progress-bar", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=timeout)
    return Done(done.returncode, done.stdout + done.stderr, Path(folder))


def given(**values):
    "Arguments of papermill for these parameters."
    return [word for name, value in values.items() for word in ("-p", name, str(value))]


def smoke_run(shared, path=GKD, **values):
    "The smoke run of a paper notebook, by the first process of this test run that asks, for all."
    folder, kept = shared/path.stem, shared/path.stem/"done.json"
    with alone(shared/f"{path.stem}.lock"):
        if not kept.exists():
            folder.mkdir()
            done = papermill(folder, *given(preset="smoke", **values), path=path, timeout=1500, MEDKD_CACHE=str(shared/"cache"))
            kept.write_text(json.dumps(dict(code=done.code, text=done.text)))
    return Done(**json.loads(kept.read_text()), folder=folder)


def cell_sources(path, **values):
    "Sources of the code cells, with the cell that papermill puts behind the parameters."
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    notebook = parameterize_notebook(load_notebook_node(str(path)), values)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


class Cells:
    "A paper notebook in this process: `namespace` is what its cells have made so far."
    def __init__(self, path=GKD, **values):
        self.sources, self.namespace = cell_sources(path, **values), dict(In=[""])
        self.position = 0

    def run_to(self, text, skip=()):
        "Run the cells up to and with the next one that holds `text`; cells that hold one of `skip` are left out."
        last = next(i for i, source in enumerate(self.sources) if i >= self.position and text in source)
        for source in self.sources[self.position:last + 1]:
            self.position += 1
            if text in source or not any(word in source for word in skip): self.run(source)
        return self.namespace

    def run(self, source):
        self.namespace["In"].append(source)
        plain = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
        exec(compile(plain, f"<cell {self.position}>", "exec"), self.namespace)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    "A folder that all processes of this test session share."
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def cache(shared, monkeypatch):
    "Phantoms and prepared data of this test run, made once for all its processes."
    monkeypatch.setenv("MEDKD_CACHE", str(shared/"cache"))


FUNDI, LIVERS = ("chasedb1", "stare", "drive"), ("chaos", "lits")
TWINS = dict(chasedb1=(("Image_01L", "Image_01R", "Image_02L", "Image_10L", "Image_11L", "Image_12L", "Image_13L"), (72, 100)),
             stare=(("im0001", "im0002", "im0003"), (64, 90)), drive=(("01_test", "02_test", "03_test"), (90, 72)),
             chaos=(("1", "2", "5", "6", "8", "10", "14", "16"), (4, 64, 72)), lits=(("0", "1"), (4, 72, 64)))


def few(shared, names):
    "A data root with twins of a few small cases, made once for all processes of this test run."
    from medkd.data import phantom
    with alone(shared/"twins.lock"):
        for name in names: phantom(name, shared/"twins", *TWINS[name])
    return shared/"twins"


@pytest.fixture(scope="session")
def fundi(shared): return few(shared, FUNDI)


@pytest.fixture(scope="session")
def livers(shared): return few(shared, LIVERS)


@contextlib.contextmanager
def alone(path):
    "Only one process of a test session at a time is inside."
    import fcntl
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
