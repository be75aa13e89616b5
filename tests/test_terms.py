"""Every Term that medkd.losses defines keeps the four contracts on its own examples."""
import importlib
import pkgutil

import pytest

import medkd.losses
from medkd.core import Term
from medkd.losses.contracts import check_contracts


def terms():
    "Term classes by dotted name, each where it is defined."
    modules = [importlib.import_module(found.name)
               for found in pkgutil.walk_packages(medkd.losses.__path__, "medkd.losses.")]
    found = {f"{module.__name__}.{name}": value for module in modules
             for name, value in vars(module).items()
             if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in found.items()
            if isinstance(value, type) and issubclass(value, Term)}


@pytest.mark.parametrize("name", sorted(terms()))
def test_contracts(name): check_contracts(terms()[name])


def test_terms_are_found():
    assert {"medkd.losses.task.Seg", "medkd.losses.logits.KD", "medkd.losses.at.AT"} <= set(terms())


@pytest.mark.parametrize("name", sorted(terms()))
def test_names_are_unique_and_declared(name):
    cls = terms()[name]
    term = cls.example(2, 2)[0]
    assert term.names and len(set(term.names)) == len(term.names)
    assert len(term.needs) == 2 and all(isinstance(tap, str) for side in term.needs for tap in side)
