"""No code comes in with data: what the sources may not call, archives, paths, parameters, pages, floors.

SECURITY.md says what is promised; this file holds it to that.
"""
import ast
import io
import json
import re
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
SHIPPED = ("medkd", "papers", "benchmarks", "docs", "setup.py")


# what the sources call -----------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "pd.read_pickle", "pandas.read_pickle",
         "get_ipython().system", "get_ipython().run_cell", "run_line_magic", "run_cell_magic"}
FROM = {("os", "system"), ("os", "popen"), ("tempfile", "mktemp"), ("torch", "load"), ("numpy", "load")}
LOADS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
ALLOWED = { # file of the tests -> what it may do, and why
    "tests/notebooks.py": {"exec", "compile"},       # runs the cells of this repository's own notebooks
    "tests/faults/stages.py": {"exec", "compile"},   # likewise
    "tests/test_show.py": {"exec", "eval"},          # likewise
    "tests/test_start.py": {"exec", "compile"},      # likewise
    "tests/faults/test_damage.py": {"pickle"}}       # makes the files that must not run


def dangers(source):
    "(line, what) for everything in a source that could run what it reads."
    tree = ast.parse(source)
    copies = {id(part) for node in ast.walk(tree) for part in own_copy(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names if alias.name != "pickle" or alias.asname]
            yield from ((node.lineno, name) for name in names if name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in MODULES: yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names if (node.module, a.name) in FROM)
        elif isinstance(node, ast.Name) and node.id == "pickle" and id(node) not in copies: yield node.lineno, "pickle"
        elif isinstance(node, ast.Call): yield from ((node.lineno, what) for what in called(node))


def own_copy(node):
    "`pickle.loads(pickle.dumps(x))`: an object's way to another process and back, no file is read."
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "pickle.loads" and isinstance(node.args[0], ast.Call):
        inner = node.args[0].func
        if ast.unparse(inner) == "pickle.dumps": yield from (node.func.value, inner.value)


def called(node):
    name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
    if name in CALLS: yield name
    if "shell" in given and name != "dict" and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False): yield "shell"
    if name in LOADS:
        key, safe = LOADS[name]
        if not (isinstance(given.get(key), ast.Constant) and given[key].value is safe): yield f"{name} without {key}={safe}"
    if isinstance(given.get("allow_pickle"), ast.Constant) and given["allow_pickle"].value: yield "allow_pickle"


def notebook_source(path):
    "Its code; a line that IPython takes to a shell, or an unknown magic, stays and is found below."
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"^%matplotlib inline$", "", text, flags=re.M)


def files(*places):
    for place in places:
        path = ROOT/place
        found = [path] if path.is_file() else sorted([*path.rglob("*.py"), *path.rglob("*.ipynb")])
        yield from (p for p in found if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("source", [
    "import pickle\npickle.load(f)", "import pickle as p", "from pickle import loads", "import joblib", "import yaml", "import dill",
    "eval(text)", "exec(text)", "__import__(name)", "os.system('ls')", "from os import system", "subprocess.run(c, shell=True)",
    "subprocess.run(c, shell=flag)", "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)",
    "np.load(path, allow_pickle=True)", "numpy.load(path, allow_pickle=flag)", "from torch import load", "tempfile.mktemp()",
    "pd.read_pickle(path)", "import pickle\npickle.loads(data)", "import pickle\npickle.loads(read(pickle.dumps(x)))"])
def test_a_danger_is_found(source): assert list(dangers(source))


@pytest.mark.parametrize("source", [
    "torch.load(path, map_location='cpu', weights_only=True)", "np.load(path, allow_pickle=False)", "net.eval()",
    "import pickle\npickle.loads(pickle.dumps(x))", "subprocess.run(command, check=True)", "re.compile(text)", "model.load(path)",
    "dict(background=0, shell=1)"])
def test_the_rest_passes(source): assert not list(dangers(source))


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in files("tests")])
def test_tests_run_nothing_they_read(path):
    found = {what for _, what in dangers(path.read_text())}
    assert found <= ALLOWED.get(str(path.relative_to(ROOT)), set()), found


def test_sources_run_nothing_they_read():
    bad = []
    for path in files(*SHIPPED, "nbs"):
        text = notebook_source(path) if path.suffix == ".ipynb" else path.read_text()
        bad += [(str(path.relative_to(ROOT)), line, what) for line, what in dangers(text)]
        if not str(path.relative_to(ROOT)).startswith("nbs") and re.search(r"^\s*import pickle", text, re.M): bad.append((str(path), "pickle"))
    assert not bad


# archives ------------------------------------------------------------------------------------------

def member(name, kind=tarfile.REGTYPE, size=2):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size * (kind == tarfile.REGTYPE), "/etc/passwd"
    return info


def tar_of(path, *members):
    with tarfile.open(path, "w") as file:
        for info in members: file.addfile(info, io.BytesIO(bytes(info.size)))
    return path


@pytest.mark.parametrize("name, kind", [
    ("/a", tarfile.REGTYPE), ("../a", tarfile.REGTYPE), ("a/../../b", tarfile.REGTYPE), ("C:/a", tarfile.REGTYPE), ("..\\a", tarfile.REGTYPE),
    ("a", tarfile.SYMTYPE), ("a", tarfile.LNKTYPE), ("a", tarfile.CHRTYPE), ("a", tarfile.BLKTYPE), ("a", tarfile.FIFOTYPE)])
def test_archives_stay_in_their_folder(tmp_path, name, kind):
    from medkd.data.files import safe_extract
    tar = tar_of(tmp_path/"a.tar", member("fine"), member(name, kind))
    with pytest.raises(ValueError, match="nothing was unpacked"): safe_extract(tar, tmp_path/"in"/"out")
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as file:
        file.writestr("fine", "x")
        info = zipfile.ZipInfo(name)
        if kind == tarfile.SYMTYPE: info.external_attr = 0o120777 << 16
        elif kind != tarfile.REGTYPE: return # zip has neither of them
        file.writestr(info, "x")
    with pytest.raises(ValueError, match="nothing was unpacked"): safe_extract(tmp_path/"a.zip", tmp_path/"in"/"out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "a.zip", "in"]


def test_a_bomb_is_not_unpacked(tmp_path):
    from medkd.data.files import safe_extract
    with zipfile.ZipFile(tmp_path/"bomb.zip", "w", zipfile.ZIP_DEFLATED) as file: file.writestr("zeros", bytes(10**6))
    data = (tmp_path/"bomb.zip").read_bytes() # both headers say 3 GB
    (tmp_path/"bomb.zip").write_bytes(data.replace((10**6).to_bytes(4, "little"), (3 * 10**9).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="no archive of its size does; nothing was unpacked"):
        safe_extract(tmp_path/"bomb.zip", tmp_path/"out")
    assert not (tmp_path/"out").exists()


# paths that come with data -------------------------------------------------------------------------

def test_cases_become_files_of_their_folder_only(tmp_path):
    from medkd.inference import read_prediction
    from medkd.native import read_labels
    for read in (read_prediction, read_labels):
        with pytest.raises(ValueError, match="leads out of"): read(tmp_path/"in", "../../etc/x")


def test_lists_of_files_stay_in_their_folder(tmp_path):
    from medkd.data.tasks import find_msd
    (tmp_path/"imagesTr").mkdir()
    rows = [dict(image="../../secret.nii.gz", label="labelsTr/a.nii.gz")]
    about = dict(name="x", modality={"0": "CT"}, labels={"0": "background", "1": "organ"}, training=rows)
    (tmp_path/"dataset.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="secret.nii.gz' leads out of"): find_msd(tmp_path)


def test_a_run_that_points_elsewhere_reads_no_other_file(tmp_path):
    from medkd.files import write_json
    from medkd.trainers import Run
    from medkd.trainers.run import restore
    write_json(tmp_path/"params.json", dict(recipe=dict(student={"run": "../../../../../../etc"})))
    with pytest.raises(FileNotFoundError, match="no run at"): restore(Run(tmp_path).params["recipe"]["student"], tmp_path)


def test_temporary_files_cannot_be_foreseen(tmp_path):
    from medkd.files import write_temporary
    first, second = (write_temporary(tmp_path/"a", b"x") for _ in range(2))
    assert first != second and re.fullmatch(r"\.a\.[0-9a-f]{16}\.tmp", first.name)


# parameters ----------------------------------------------------------------------------------------

EVIL = ["__import__('os').mkdir('pwned')", "x'); import os; os.mkdir('pwned') #", 'kd"\nimport os\nos.mkdir("pwned")', "{{ 7*7 }}", "$(mkdir pwned)"]


@pytest.mark.parametrize("text", EVIL)
def test_parameters_are_never_evaluated(tmp_path, monkeypatch, text):
    from medkd.papers import choose, injected, number_list, numbers
    from notebooks import GKD, cell_sources
    monkeypatch.chdir(tmp_path)
    cell, = (s for s in cell_sources(GKD, methods=text) if s.startswith("# Parameters"))
    statement, = ast.parse(cell).body
    assert isinstance(statement.value, ast.Constant) and statement.value.value == text and injected([cell]) == ["methods"]
    with pytest.raises(KeyError): choose(text, dict(kd=()))
    for read in (number_list, lambda text: numbers(text, "patch")):
        with pytest.raises(ValueError): read(text)
    assert not list(tmp_path.iterdir())


# pages ---------------------------------------------------------------------------------------------

def test_case_names_are_text_in_tables():
    from medkd.tables import per_case, score_table
    name = "<img src=x onerror=alert(1)>"
    rows = [dict(dataset="<b>data</b>", method=name, case=name, cls="vessel", metric="dice", value=1.)]
    for table in (per_case(rows, ["dataset", "method"]), score_table(rows, note=name)):
        page = table._repr_html_()
        assert "<img" not in page and "&lt;img" in page and "<b>" not in page


# floors, downloads ---------------------------------------------------------------------------------

FLOORS = {"torch": "2.10", "monai": "1.6", "jupyter-server": "2.18", "ipykernel": "7"}


def test_floors():
    settings = ConfigParser(delimiters="=")
    settings.read(ROOT/"settings.ini")
    asked = {r.name: r for r in map(Requirement, settings["DEFAULT"]["requirements"].split())}
    lines = [line.partition("==") for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line]
    pins = {name.lower().replace("_", "-"): Version(version) for name, _, version in lines}
    for name, floor in FLOORS.items():
        low, = (Version(s.version) for s in asked[name].specifier if s.operator == ">=")
        assert low >= Version(floor) and pins[name] in asked[name].specifier, name
    assert tomllib.loads((ROOT/"pyproject.toml").read_text())["build-system"]["build-backend"] == "setuptools.build_meta"


def test_downloads_are_https_and_checked():
    from medkd.data import DATASETS
    from medkd.data.fetch import read_manifest
    fetched = [source for source in DATASETS.values() if source.archives]
    assert fetched
    for source in fetched:
        assert all(archive.url.startswith("https://") for archive in source.archives)
        sums = read_manifest(source.manifest).values() if source.manifest else [a.sha256 for a in source.archives]
        assert sums and all(re.fullmatch("[0-9a-f]{64}", sha or "") for sha in sums), source.name
