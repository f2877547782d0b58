"""The examples in docstrings do what they show."""

import doctest
import importlib
import pkgutil

import pytest

import recon3d

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(recon3d.__path__, "recon3d.")
    if not info.name.startswith(("recon3d.kernels", "recon3d.__main__")) and not info.name.endswith("hdf5_child")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert found > 20
