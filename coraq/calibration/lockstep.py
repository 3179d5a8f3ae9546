"""The calibration engine: one pass in which all micro-batches of all streams advance together, layer by layer.

Each micro-batch runs the network's ordinary `forward` in its own greenlet. A hook on every stop (a quantizable
layer) parks it there; once all have arrived, the layer's inputs in the float network (teacher) and in the network
quantized so far (student) lie side by side. The method commits the layer, and the pass goes on with the committed
weights. So a sequential method costs one float pass and one student pass, whatever the depth, and any `nn.Module`
will do, traceable or not.

Memory is what the parked micro-batches keep alive. Early layers have the largest activations and the fewest inputs, so
their statistics need fewer images: a `Schedule` lets the other micro-batches join when activations have shrunk, each
through all that has been committed in one go, as fast as a plain pass and with nothing of it kept. `Spill` bounds what
is left: past the bound, micro-batches give their activations to a temporary file while others run, and get them back
bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from coraq.activations.points import OUTPUT
from coraq.calibration.releasable import ReleaseHooks, watched_pass
from coraq.calibration.schedule import Schedule
from coraq.calibration.spill import LiveStorages, Spill
from coraq.errors import CoraqError


class LayerInputs:
    """All micro-batches of all streams, parked in front of one layer, or behind a module.

    Attributes:
        taken: which micro-batches these are, in their order here: those that have joined.
        transforms: a stream → what its inputs go through before anybody sees them (activation quantization).
    """

    def __init__(
        self,
        name: str,
        parked: list[list[_MicroBatch]],
        taken: Sequence[int],
        all_calls: Callable[[int, Sequence[str]], Iterator[Tensor]] | None = None,
    ) -> None:
        self.name = name
        self._all_calls = all_calls
        self.taken = taken
        self.transforms: dict[int, Callable[[Tensor], Tensor]] = {}
        self._parked = parked
        self.batch_size = parked[0][0].size
        self.images = sum(batch.size for batch in parked[0])

    def inputs(self, stream: int) -> Iterator[Tensor]:
        """The layer's input in each micro-batch of a stream; do not keep a tensor after the next is asked for."""
        transform = self.transforms.get(stream, _as_it_is)
        for batch in self._parked[stream]:
            for x in batch.visit():
                yield transform(x)

    def all_calls(self, stream: int, modules: Sequence[str]) -> Iterator[Tensor]:
        """What modules read at all of their calls, in a pass of each micro-batch through a stream as it is now."""
        if self._all_calls is not None:
            yield from self._all_calls(stream, modules)

    @property
    def sizes(self) -> list[int]:
        """Images in each micro-batch."""
        return [batch.size for batch in self._parked[0]]

    def pairs(self, raw: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(input in the first stream, input in the second) of each micro-batch; raw: as they wait, untransformed."""
        left, right = (_as_it_is if raw else self.transforms.get(stream, _as_it_is) for stream in (0, 1))
        for first, second in zip(self._parked[0], self._parked[1], strict=True):
            for x in first.visit():
                for y in second.visit():
                    yield left(x), right(y)


@torch.no_grad()
def _read_by(network: nn.Module, images: Tensor, modules: Sequence[str]) -> list[Tensor]:
    """What these modules read at each of their calls, copied."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else next(iter(kwargs.values()))).clone())

    handles = [network.get_submodule(m).register_forward_pre_hook(keep, with_kwargs=True) for m in modules]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _MicroBatch:
    """One forward pass of one micro-batch in one stream."""

    def __init__(self, model: nn.Module, batch: Tensor | Sequence[Tensor], stream: int, spill: Spill | None) -> None:
        shared = isinstance(batch, Tensor)
        images = batch if isinstance(batch, Tensor) else batch[stream]
        self.size = len(images)
        self._greenlet = watched_pass(model, images, shared)
        self._spill = spill
        self._input: Tensor | None = None

    def visit(self) -> Iterator[Tensor]:
        assert self._input is not None
        if self._spill is None:
            yield self._input
            return
        self._spill.load(self._input)
        try:
            yield self._input
        finally:
            self._spill.drop()

    def advance(self, hub: greenlet, to: str | None = None) -> str | None:
        """Run on to the next stop, or over others to a named one; returns its name, or None at the network's end."""
        self._input = None
        self._greenlet.parent = hub
        if self._spill is None:
            return self._run(to)
        self._spill.load()
        with self._spill.live:
            name = self._run(to)
        if name is not None:
            self._spill.save()
        return name

    def _run(self, to: str | None) -> str | None:
        while True:
            result = self._greenlet.switch()
            if self._greenlet.dead:
                return None
            name, self._input = result
            if to in (None, name):
                return str(name)

    def close(self) -> None:
        self._input = None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()  # unwinds the forward pass, so that its hooks and contexts are left in order
        if self._spill is not None:
            self._spill.close()


def live_bytes(
    model: nn.Module,
    batch: Tensor | Sequence[Tensor],
    stops: Sequence[str],
    release: Sequence[str] = (),
    within: AbstractContextManager[Any] | None = None,
) -> dict[str, int]:
    """Bytes that one micro-batch keeps alive at each stop, in execution order; a sequence's first is the model's."""
    live, found = LiveStorages([model], [batch] if isinstance(batch, Tensor) else batch), dict[str, int]()
    engine = LockStep([model], [batch], stops, release=release, within=within)  # type: ignore[arg-type]
    try:
        with live:
            while (layer_inputs := engine.advance()) is not None:
                found[layer_inputs.name] = live.bytes_alive()
    finally:
        engine.close()
    return found


class LockStep:
    """One lock-step pass; iterate `advance()` over the stops, then `close()`.

    Args:
        streams: networks in eval mode, or the same part of each; the same stops, under the same names.
        batches: micro-batches [n, channels, height, width], all on the networks' device; or, where the streams do not
            take the same, one for each stream (of which they get copies: a part of a network may work in place).
        stops: names of the modules to stop at, and `output_stop`s.
        memory_bytes: bound on live activations; None does not bound them.
        folder: where the activation files go if the bound asks for them; default: the system's temporary folder.
        rewrite: (stream, stop, output) → what goes on from a stop behind a module.
        schedule: when which micro-batches join; of at least these stops. Default: all are there from the start.
        release: what `releasable_inputs` found.
        within: entered while networks run, and left while they wait (`coraq.calibration.bfloat16_pass.BFloat16Pass`).
    """

    def __init__(
        self,
        streams: Sequence[nn.Module],
        batches: Sequence[Tensor] | Sequence[Sequence[Tensor]],
        stops: Sequence[str],
        memory_bytes: int | None = None,
        folder: Path | None = None,
        rewrite: Callable[[int, str, Tensor], Tensor] | None = None,
        schedule: Schedule | None = None,
        release: Sequence[str] = (),
        within: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._streams = list(streams)
        self._within: AbstractContextManager[Any] = nullcontext() if within is None else within
        self._stops = sorted(set(stops))
        self._rewrite = rewrite
        self._folder = folder or Path(tempfile.gettempdir())
        self.live_bytes_needed = 0
        self._given = batches
        given = [b for batch in batches for b in ([batch] if isinstance(batch, Tensor) else batch)]
        every = len(batches if schedule is None else schedule.order) * len(self._streams)
        resident = every
        if memory_bytes is not None and batches:
            if schedule is None:
                live = live_bytes(self._streams[0], batches[0], self._stops, release, within)
                schedule = Schedule.plan(live, [1] * len(batches))
            self.live_bytes_needed = schedule.bytes_needed * len(self._streams)
            if self.live_bytes_needed > memory_bytes:
                one = max(schedule.live.values())  # of one micro-batch
                resident = int((memory_bytes - 2 * one) // max(1, one))
        self.spilled = max(0, every - max(0, resident))
        self._handles = [self._hook(index, name) for index in range(len(self._streams)) for name in self._stops]
        self._handles += [ReleaseHooks(model, release) for model in self._streams]
        self._present = {} if schedule is None else schedule.present
        self._order = list(range(len(batches))) if schedule is None else schedule.order
        # a resumed pass has not all of the schedule's stops
        start = next((count for stop, count in self._present.items() if stop in self._stops), len(batches))
        self._batches: list[list[_MicroBatch]] = [[] for _ in self._streams]
        self._waiting: list[list[_MicroBatch]] = [[] for _ in self._streams]
        for count, index in enumerate(self._order):
            for stream, model in enumerate(self._streams):
                spilled = count * len(self._streams) + stream < self.spilled
                spill = Spill(LiveStorages(self._streams, given), self._folder) if spilled else None
                batch = _MicroBatch(model, batches[index], stream, spill)
                (self._batches if count < start else self._waiting)[stream].append(batch)

    def _hook(self, stream: int, name: str) -> Any:
        def park(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            me = getcurrent()
            seen = getattr(me, "coraq_seen", None)
            if seen is None or name in seen:  # an ordinary call, or a module that runs more than once
                return
            seen.add(name)
            me.parent.switch((name, args[0] if args else next(iter(kwargs.values()))))

        def park_behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            me = getcurrent()
            seen = getattr(me, "coraq_seen", None)
            if seen is None or name in seen:
                return output
            seen.add(name)
            me.parent.switch((name, output))
            return output if self._rewrite is None else self._rewrite(stream, name, output)

        model = self._streams[stream]
        if name.endswith(OUTPUT):
            return model.get_submodule(name.removesuffix(OUTPUT)).register_forward_hook(park_behind)
        return model.get_submodule(name).register_forward_pre_hook(park, with_kwargs=True)

    @torch.no_grad()
    def advance(self, on_stream: Callable[[int], None] | None = None) -> LayerInputs | None:
        """Run all micro-batches that take part to their next stop, and those that join there. None: the network's end.

        `on_stream` is called with a stream's index after its micro-batches have run (for timing).

        Raises:
            CoraqError: micro-batches stopped at different layers.
        """
        with self._within:
            arrived = self._advance(on_stream)
        if len(arrived) != 1:
            raise CoraqError(
                f"the network ran different layers for different images: {sorted(map(str, arrived))}",
                "Its forward pass depends on the data; such a network cannot be calibrated layer by layer.",
            )
        name = arrived.pop()
        if name is None:
            return None
        taken = self._order[: len(self._batches[0])]

        def all_calls(stream: int, modules: Sequence[str]) -> Iterator[Tensor]:
            for index in taken:
                given = self._given[index]
                with self._within:
                    images = given if isinstance(given, Tensor) else given[stream].clone()
                    read = _read_by(self._streams[stream], images, modules)
                yield from read

        return LayerInputs(name, self._batches, taken, all_calls)

    def _advance(self, on_stream: Callable[[int], None] | None) -> set[str | None]:
        """The names of the stops at which micro-batches are now."""
        hub, arrived = getcurrent(), set[str | None]()
        for stream, (batches, waiting) in enumerate(zip(self._batches, self._waiting, strict=True)):
            for batch in batches:
                arrived.add(batch.advance(hub))
            if len(arrived) == 1:
                (stop,) = arrived
                joining = max(0, self._present.get(stop or "", 0) - len(batches))
                for batch in waiting[:joining]:
                    arrived.add(batch.advance(hub, to=stop))
                batches += waiting[:joining]
                del waiting[:joining]
            if on_stream is not None:
                on_stream(stream)
        return arrived

    def close(self) -> None:
        """Leave the parked forward passes, remove the hooks and the activation files."""
        for batches in (*self._batches, *self._waiting):
            for batch in batches:
                batch.close()
            batches.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
