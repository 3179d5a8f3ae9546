"""Scripts of the examples/ folder, which is no package, as modules that tests can use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """The script examples/NAME.py, imported once."""
    alias = f"coraq_example_{name}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module  # before it runs: dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
