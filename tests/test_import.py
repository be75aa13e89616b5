"""What importing costs: heavy packages only where they are used."""
import pkgutil
import subprocess
import sys

import medkd

HEAVY = ("monai", "skimage", "sklearn", "seaborn", "pandas", "accelerate", "matplotlib.pyplot",
         "tensorboard")


def imported_by(code):
    "Names of all modules after `code` in a fresh interpreter."
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
                          capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_package_alone():
    modules = imported_by("import medkd")
    assert "medkd" in modules and not {"torch", "numpy", *HEAVY} & modules


def test_no_module_imports_heavy_packages():
    names = [found.name for found in pkgutil.walk_packages(medkd.__path__, "medkd.")
             if not found.name.endswith("__main__")]
    assert len(names) > 20
    modules = imported_by("\n".join(f"import {name}" for name in names))
    assert set(names) <= modules
    assert not set(HEAVY) & modules
