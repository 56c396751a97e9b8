# SPDX-License-Identifier: Apache-2.0
"""The examples in all docstrings, in README.md and in docs run and print what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import gpu3d

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def examples():
    """Every docstring of gpu3d with an example."""
    names = {"gpu3d", *(module.name for module in pkgutil.walk_packages(gpu3d.__path__, "gpu3d."))}
    for name in sorted(names):
        if name.startswith(("gpu3d.interop.torch", "gpu3d.interop.jax")) or name.endswith(".__main__"):
            continue  # interop needs a framework, and __main__ would run the command
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
    if ">>> import torch" in test.docstring:
        pytest.importorskip("torch")
    run(test)


@pytest.mark.parametrize("name", gpu3d.__all__)
def test_every_public_name_is_explained(name):
    assert getattr(gpu3d, name).__doc__.strip()


@pytest.mark.parametrize("name", [name for name in gpu3d.__all__ if name[0].islower()])
def test_every_function_has_an_example(name):
    assert ">>> " in getattr(gpu3d, name).__doc__


PAGES = [page for page in (README, *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write files
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    session = "\n".join(block for block in blocks if ">>> " in block)  # what one block makes, the next may use
    run(doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0))
