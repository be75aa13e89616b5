"""One thread for each process, and the helper modules of this folder importable everywhere."""
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, str(HERE))
pytest_plugins = ["notebooks"]  # its fixtures are everyone's


def pytest_collection_modifyitems(items):
    "The files that run whole paper notebooks come first, so that no process is left with one at the end."
    items.sort(key=lambda item: not item.path.name.startswith(("test_paper", "test_compare")))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    "What one test told accelerate is not left to the next."
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
