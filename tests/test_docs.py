# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows is what happens: the examples of every docstring, and those of README.md."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import gpu3d

README = Path(__file__).resolve().parent.parent / "README.md"


def examples():
    """Every docstring of gpu3d that has an example to run."""
    names = {"gpu3d", *(module.name for module in pkgutil.walk_packages(gpu3d.__path__, "gpu3d."))}
    for name in sorted(names):
        if name in ("gpu3d.interop.torch", "gpu3d.interop.jax") or name.endswith(".__main__"):
            continue  # the first needs a framework, the second would run
        module = importlib.import_module(name)
        for test in doctest.DocTestFinder().find(module, globs={}):
            own = test.name.removeprefix(f"{name}.").partition(".")[0]
            test.globs = {"np": np, "gpu3d": gpu3d, own: getattr(module, own, module)}
            if not all(example.options.get(doctest.SKIP) for example in test.examples):
                yield pytest.param(test, id=test.name)


def run(test):
    report = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    assert attempted and not failed, "".join(report)


@pytest.mark.parametrize("test", list(examples()))
def test_docstring(test):
    run(test)


@pytest.mark.parametrize("name", gpu3d.__all__)
def test_every_public_name_is_explained(name):
    assert getattr(gpu3d, name).__doc__.strip()


@pytest.mark.parametrize("name", [name for name in gpu3d.__all__ if name[0].islower()])
def test_every_function_has_an_example(name):
    assert ">>> " in getattr(gpu3d, name).__doc__


def test_readme():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    session = "\n".join(blocks)  # read from top to bottom: what one block makes, the next may use
    run(doctest.DocTestParser().get_doctest(session, {}, "README.md", str(README), 0))
