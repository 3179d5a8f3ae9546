"""Each test module can be read, run and deleted by itself: what several share lies in `support` and `conftest.py`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported(source: str) -> set[str]:
    """The modules that a source text imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module or ''}.{alias.name}" for alias in node.names)
    return found


def of_tests(names: set[str]) -> set[str]:
    return {name for name in names if any(part.startswith("test_") for part in name.split("."))}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module(path: Path) -> None:
    assert of_tests(imported(path.read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize(
    "source",
    ["import test_a", "from test_a import b", "from tests.test_a import b", "from . import test_a",
     "def f():\n    from test_a import b"],
)  # fmt: skip
def test_every_form_of_such_an_import_is_found(source: str) -> None:
    assert of_tests(imported(source))
    assert not of_tests(imported(source.replace("test_a", "support")))
