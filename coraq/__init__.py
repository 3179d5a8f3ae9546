"""coraq: any timm ConvNet to 4 bits and below, without training, by any published method.

`import coraq` is cheap: torch is imported when `quantize` or `load` is first touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coraq.version import __version__ as __version__

__all__ = ["__version__", "load", "quantize"]

if TYPE_CHECKING:
    from coraq.pipeline import load, quantize


def __getattr__(name: str) -> Any:
    if name in ("load", "quantize"):
        from coraq import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'coraq' has no attribute {name!r}")
