"""Exit 1, with their names, when exporting and cleaning the notebooks changes a file."""
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sources():
    "Files of the working tree that git tracks or would."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({name for name in listed.split("\0") if name and (ROOT/name).is_file()})


def export_and_clean(folder):
    "As `make export` does."
    for command in (["nbdev_export"], ["nbdev_clean"], ["nbdev_clean", "--fname", "papers"]):
        if "papers" in command and not (folder/"papers").is_dir(): continue
        subprocess.run([Path(sys.executable).parent/command[0], *command[1:]], cwd=folder,
                       check=True,
                       stdout=subprocess.DEVNULL)


def differences(folder, names):
    "Files of `folder` that are not as in the working tree, and those that are new there."
    made = {str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}
    def same(name): return name in made and (folder/name).read_bytes() == (ROOT/name).read_bytes()
    other = [name for name in names if not same(name)]
    return sorted({*other, *(made - set(names))})


def main():
    names = sources()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            copy = Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT/name).read_bytes())
        export_and_clean(Path(folder))
        found = differences(Path(folder), names)
    if found: sys.exit("notebooks and package differ; run `make export`:\n" + "\n".join(found))
    print(f"{sum(name.endswith('.ipynb') for name in names)} notebooks are clean and exported")


if __name__ == "__main__": main()
