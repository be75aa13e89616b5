"""The wheel: built from the sources, installed alone, imported, complete."""
import json
import os
import subprocess
import sys
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command, cwd):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def listed(*arguments):
    return run("git", "ls-files", *arguments, cwd=ROOT).splitlines()


def copy_of_sources(folder):
    "The files of the repository, tracked and not ignored, in `folder`."
    for name in listed("--cached", "--others", "--exclude-standard"):
        if not (ROOT/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes((ROOT/name).read_bytes())
    return folder


def test_wheel(tmp_path):
    source = copy_of_sources(tmp_path/"source")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check",
        "-q", "-w", tmp_path, source, cwd=tmp_path)
    wheel, = tmp_path.glob("*.whl")
    venv.create(tmp_path/"venv")
    python = tmp_path/"venv"/"bin"/"python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
        "--disable-pip-version-check", wheel, cwd=tmp_path)
    script = """if True:
        import json, medkd
        from importlib.metadata import files, metadata
        m = metadata("medkd")
        print(json.dumps(dict(
            where=medkd.__file__, version=medkd.__version__, python=m["Requires-Python"],
            licence=m.get("License-Expression") or m["License"],
            files=[str(f) for f in files("medkd")])))
    """
    found = json.loads(run(python, "-I", "-c", script, cwd=tmp_path))
    assert Path(found["where"]).is_relative_to(tmp_path/"venv")
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    assert found["version"] == config["DEFAULT"]["version"]
    assert sorted(found["python"].split(",")) == ["<3.14", ">=3.11"]
    assert found["licence"] == "Apache-2.0"
    tracked = listed("medkd")
    assert {name for name in tracked if (ROOT/name).is_file()} <= set(found["files"])
    assert any(name.endswith("LICENSE") for name in found["files"])
    assert any(name.endswith(".json") and name.startswith("medkd/data") for name in found["files"])
