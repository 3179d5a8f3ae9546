"""The honest benchmark: a grid of runs, finished ones reused, ranked at equal bytes."""

from coraq.compare.grid import Cell, Variant, expand, parse_variants
from coraq.compare.local import LocalEngine
from coraq.compare.run import Engine, Outcome, compare

__all__ = ["Cell", "Engine", "LocalEngine", "Outcome", "Variant", "compare", "expand", "parse_variants"]
