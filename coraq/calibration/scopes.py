"""What each scope of a method offers, and a task that offers no more than that."""

from __future__ import annotations

from typing import Any, Literal

from coraq.errors import UsageError

Scope = Literal["layer", "block", "network"]

_LAYER = {"layers", "scheme", "rng", "has_data", "stats", "least_squares", "problem", "commit", "bytes_of"}
_LAYER |= {"log", "stage", "note"}
_BLOCK = _LAYER | {"teacher", "partition", "block_io", "fisher", "quantize_block_with"}
_NETWORK = _BLOCK | {"student", "batches", "calibration_subset", "preview", "decide_once"}
_NETWORK |= {"quantize_with", "delegate", "scope_of", "committed_bytes", "budget_bytes"}
OFFERED: dict[Scope, set[str]] = {"layer": _LAYER, "block": _BLOCK, "network": _NETWORK}


class ScopedTask:
    """A task as a method of one scope sees it.

    Raises:
        UsageError: the method asks for what its scope lacks.
    """

    def __init__(self, task: Any, scope: Scope, method: str) -> None:
        self._task, self._scope, self._method = task, scope, method

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in OFFERED[self._scope]:
            wider = [scope for scope, names in OFFERED.items() if name in names]
            raise UsageError(
                f"method {self._method} has scope {self._scope!r}, which does not offer task.{name}",
                f'Declare scope = "{wider[0]}" in the method.' if wider else "See coraq.api for what a task offers.",
            )
        return getattr(self._task, name)
