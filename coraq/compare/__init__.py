"""The honest benchmark: a grid of runs, finished ones reused, ranked at equal bytes.

Names are imported when they are first touched: a cluster's event queue imports `coraq.compare.worker_events` in a
process that must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coraq.compare.grid import Cell, Variant, expand, parse_variants
    from coraq.compare.local import LocalEngine
    from coraq.compare.run import Engine, Outcome, compare

__all__ = ["Cell", "Engine", "LocalEngine", "Outcome", "Variant", "compare", "expand", "parse_variants"]

_HOMES = {
    "Cell": "grid",
    "Engine": "run",
    "LocalEngine": "local",
    "Outcome": "run",
    "Variant": "grid",
    "compare": "run",
    "expand": "grid",
    "parse_variants": "grid",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"coraq.compare.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'coraq.compare' has no attribute {name!r}")
