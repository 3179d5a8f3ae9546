"""Which layers are committed, and the decisions that they rest on: what a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError

Metrics = dict[str, float | int | str]
Save = Callable[[int, str, QuantizedLayer, Metrics], None]


class CommitLog:
    """Layers that were committed, in this order, with what was measured of them.

    Args:
        done: what earlier attempts of the run have committed, in order.
        save: called with number, name, codes and metrics of every new layer before it counts as committed.
        decisions: what `decide_once` keeps beyond this process; a mapping of JSON-able values.
    """

    def __init__(
        self,
        done: Mapping[str, tuple[QuantizedLayer, Metrics]] | None = None,
        save: Save | None = None,
        decisions: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.done = dict(done or {})
        self.committed: dict[str, tuple[QuantizedLayer, Metrics]] = {}
        self._save = save
        self._decisions: MutableMapping[str, Any] = {} if decisions is None else decisions

    def __contains__(self, name: object) -> bool:
        return name in self.committed

    def __len__(self) -> int:
        return len(self.committed)

    def restore(self, name: str, layer: QuantizedLayer, metrics: Metrics) -> None:
        """A layer of an earlier attempt counts as committed."""
        self.committed[name] = (layer, metrics)

    def add(self, name: str, layer: QuantizedLayer, metrics: Metrics) -> None:
        """A new layer: it is saved, and then counts as committed."""
        if self._save is not None:
            self._save(len(self.committed), name, layer, metrics)
        self.committed[name] = (layer, metrics)

    def reopen(self, names: Sequence[str]) -> None:
        """Forget what was committed of these layers."""
        for name in names:
            del self.committed[name]

    def decide_once(self, key: str, compute: Callable[[], Any], valid: Callable[[Any], bool] | None = None) -> Any:
        """See `coraq.api.NetworkTask.decide_once`.

        Raises:
            CoraqError: layers have been committed, but what they were committed under is lost, or is none.
        """
        if key in self._decisions:
            if valid is None or valid(self._decisions[key]):
                return self._decisions[key]
            raise CoraqError(f"the decision {key!r} of this run does not fit it", "Run it afresh with --force.")
        if self.committed or self.done:
            raise CoraqError(
                f"this run has finished layers but lost the decision {key!r} that they rest on",
                "Run it afresh with --force.",
            )
        self._decisions[key] = compute()
        return self._decisions[key]
