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

import ctypes
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coraq.errors import CoraqError


class LiveStorages(TorchDispatchMode):
    """Knows which activations made under it are still alive, and which were written to after they were made.

    Args:
        exclude: modules whose parameters and buffers are no activations.

    Attributes:
        written: keys of storages that an operation may have changed in place; whoever reads it clears it.
    """

    def __init__(self, exclude: Sequence[nn.Module], images: Sequence[Tensor]) -> None:
        super().__init__()
        fixed = [t for m in exclude for t in (*m.parameters(), *m.buffers())]
        self._fixed = {t.untyped_storage()._cdata for t in (*fixed, *images)}
        self._refs: dict[int, StorageWeakRef] = {}
        self.written: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # else torch imports its compiler at the first operation, 3 s, to keep it away from this mode
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.written.update(leaf.untyped_storage()._cdata for leaf in given)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._fixed:
                    self._refs[storage._cdata] = StorageWeakRef(storage)
        return result

    def alive(self) -> list[Any]:
        """The storages that something still refers to, largest first."""
        self._refs = {key: ref for key, ref in self._refs.items() if not ref.expired()}
        found = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._refs.values()]
        return sorted((s for s in found if s is not None), key=lambda s: -s.nbytes())

    def bytes_alive(self) -> int:
        return sum(storage.nbytes() for storage in self.alive())


class _Slot(NamedTuple):
    """Where a storage's bytes lie in the file."""

    storage: StorageWeakRef  # while it is held, no other storage gets the same key
    offset: int
    size: int


class Spill:
    """Keeps one micro-batch's activations in a file while it is parked.

    The file has no name, so that it is gone with the process, however that ends.

    The storages themselves are emptied and refilled, so that every tensor and view in the parked forward pass
    stays valid and nothing of it needs to be known. What has only been read since it was written to the file, such as
    a block's input that waits to be added to its output, is not written again.
    """

    def __init__(self, live: LiveStorages, folder: Path) -> None:
        self.live, self._folder = live, folder
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed in `close`)
        except OSError as error:
            raise _no_spill(folder, error) from error
        self._slots: dict[int, _Slot] = {}

    def save(self) -> None:
        """Move all live activations to the file.

        Raises:
            CoraqError: no room for them.
        """
        alive = {storage._cdata: storage for storage in self.live.alive() if storage.nbytes()}
        stale = self.live.written
        self._slots = {key: slot for key, slot in self._slots.items() if key in alive and key not in stale}
        stale.clear()
        for key, storage in alive.items():
            if key not in self._slots:
                size = storage.nbytes()
                slot = _Slot(StorageWeakRef(storage), self._room(size), size)
                try:
                    self._file.seek(slot.offset)
                    _write(self._file, memoryview(_bytes_of(storage)).cast("B"))
                except OSError as error:
                    raise _no_spill(self._folder, error) from error
                self._slots[key] = slot
            storage.resize_(0)

    def _room(self, size: int) -> int:
        """The first offset with so many bytes that no slot needs."""
        start = 0
        for slot in sorted(self._slots.values(), key=lambda slot: slot.offset):
            if slot.offset - start >= size:
                break
            start = slot.offset + slot.size
        return start

    def load(self, only: Tensor | None = None) -> None:
        """Bring them back, or only what one tensor needs."""
        for key, slot in self._slots.items():
            if only is None or key == only.untyped_storage()._cdata:
                storage = _storage_of(slot)
                storage.resize_(slot.size)
                self._file.seek(slot.offset)
                _read(self._file, memoryview(_bytes_of(storage)).cast("B"))

    def drop(self) -> None:
        """Free them again after `load`; the file still holds what they were (nobody writes while parked)."""
        for slot in self._slots.values():
            _storage_of(slot).resize_(0)

    def close(self) -> None:
        self._slots.clear()
        self._file.close()


def _storage_of(slot: _Slot) -> Any:
    return torch.UntypedStorage._new_with_weak_ptr(slot.storage.cdata)


def _no_spill(folder: Path, error: OSError) -> CoraqError:
    return CoraqError(
        f"activations beyond the memory bound cannot be kept in {folder}: {error.strerror or error}",
        "Set TMPDIR to a folder with more room, raise --calib-memory, or lower --calib-size.",
    )


def _bytes_of(storage: Any) -> Any:
    # not through numpy(): that would pin the storage, which could then no longer be emptied
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _read(file: BinaryIO, data: memoryview) -> None:
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise CoraqError(
                "the activation file ended early", "Is something clearing the temporary folder? Run again."
            )
        data = data[count:]


_OUTPUT = ":output"  # no module's path has a colon in it


def output_stop(module: str) -> str:
    """The name of the stop behind a module, where its output waits; a module's own name is the stop in front of it."""
    return module + _OUTPUT


class Arrival:
    """All micro-batches of all streams, parked in front of one layer, or behind a module.

    Attributes:
        taken: which micro-batches these are, in their order here: those that have joined.
        transforms: a stream → what its inputs go through before anybody sees them (activation quantization).
    """

    def __init__(self, name: str, parked: list[list[_MicroBatch]], taken: Sequence[int]) -> None:
        self.name = name
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


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _MicroBatch:
    """One forward pass of one micro-batch in one stream."""

    def __init__(self, model: nn.Module, batch: Tensor | Sequence[Tensor], stream: int, spill: Spill | None) -> None:
        shared = isinstance(batch, Tensor)
        images = batch if isinstance(batch, Tensor) else batch[stream]
        self.size = len(images)
        self._greenlet = _watched(model, images, shared)
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


def spread_out(count: int) -> list[int]:
    """0 … count − 1 in an order of which every beginning is spread over all (bit-reversed, van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))


def enough(sizes: Sequence[int], images: int) -> list[int]:
    """The fewest micro-batches, spread over all, that hold so many images; all where there are not so many."""
    order = spread_out(len(sizes))
    held = accumulate(sizes[index] for index in order)
    return order[: next((count for count, seen in enumerate(held, 1) if seen >= images), len(order))]


class Schedule(NamedTuple):
    """When which micro-batches take part.

    Attributes:
        order: of the micro-batches that take part. Spread over all if some join late, or never: images may come sorted.
        present: stop → how many of these are there, in execution order. All are at the last.
        live: stop → bytes that one micro-batch keeps alive there.
    """

    order: list[int]
    present: dict[str, int]
    live: dict[str, int]

    @property
    def bytes_needed(self) -> int:
        """Live activations of one stream at its widest."""
        return max((count * self.live[stop] for stop, count in self.present.items()), default=0)

    @classmethod
    def plan(cls, live: Mapping[str, int], sizes: Sequence[int], early: int = 0) -> Schedule:
        """The others join as soon as all that are there take no more memory than the early ones at their widest.

        Args:
            live: stop → bytes that one micro-batch keeps alive there, in execution order.
            sizes: images in each micro-batch.
            early: images that are there from the start, at least; 0: all.
        """
        every = len(sizes)
        count = len(enough(sizes, early)) if early else every
        room, widest, present = count * max(live.values(), default=0), 0, dict[str, int]()
        for stop, size in reversed(list(live.items())):
            widest = max(widest, size)
            present[stop] = min(every, room // max(1, widest)) if present else every
        late = any(there < every for there in present.values())
        return cls(spread_out(every) if late else list(range(every)), dict(reversed(present.items())), dict(live))

    def limited(self, order: list[int]) -> Schedule:
        """The same with these micro-batches alone."""
        present = {stop: min(there, len(order)) for stop, there in self.present.items()}
        return Schedule(order, present, self.live)


class _Release:
    """Hooks that let go of the input of an `nn.Sequential` when its first child has returned.

    Who calls a Sequential holds on to its input until that returns: a network whose blocks are one Sequential keeps
    the first block's input, its largest activation, alive to the end. Where nobody reads it again (`released` has
    tried), its tensor is emptied; who did read it would fail on its shape. Only passes of the engine do this.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._handles: list[Any] = []
        for name in names:
            outer: Any = model.get_submodule(name)
            inner = next(outer.children())
            self._handles += [
                outer.register_forward_pre_hook(partial(self._note, name)),
                inner.register_forward_hook(partial(self._empty, name)),
            ]

    @staticmethod
    def _note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        held = getattr(getcurrent(), "coraq_held", None)
        if held is not None and args and isinstance(args[0], Tensor):
            held[name] = args[0]

    @staticmethod
    def _empty(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        me = getcurrent()
        held = getattr(me, "coraq_held", {}).pop(name, None)
        if held is not None and held is not me.coraq_images and held is not output:
            held.data = held.new_empty(0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def released(model: nn.Module, images: Tensor) -> list[str]:
    """The `nn.Sequential`s whose input nobody reads behind their first child, found by trying: see `_Release`."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential) and len(module) > 1]

    def result(of: Sequence[str]) -> list[Any] | None:
        hooks, run = _Release(model, of), _watched(model, images)
        try:
            return tree_leaves(run.switch())
        except Exception:  # whatever reading an emptied tensor leads to
            return None
        finally:
            hooks.remove()

    def same(of: Sequence[str]) -> bool:
        found = result(of)
        return found is not None and all(map(torch.equal, found, expected))

    with torch.no_grad():
        expected = tree_leaves(model(images))
        if same(names):
            return names
        names = [name for name in names if same([name])]
        return names if same(names) else []


def _watched(model: nn.Module, images: Tensor, shared: bool = True) -> greenlet:
    """A forward pass that stops at stops, and in which `_Release` acts; of a copy of images that are not shared."""
    run = greenlet(lambda: model(images if shared else images.clone()))
    run.coraq_seen, run.coraq_held, run.coraq_images = set(), {}, images
    return run


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
            while (arrival := engine.advance()) is not None:
                found[arrival.name] = live.bytes_alive()
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
        release: what `released` found.
        within: entered while networks run, and left while they wait (`coraq.model.half.HalfPass`).
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
        self._handles += [_Release(model, release) for model in self._streams]
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
        if name.endswith(_OUTPUT):
            return model.get_submodule(name.removesuffix(_OUTPUT)).register_forward_hook(park_behind)
        return model.get_submodule(name).register_forward_pre_hook(park, with_kwargs=True)

    @torch.no_grad()
    def advance(self, on_stream: Callable[[int], None] | None = None) -> Arrival | None:
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
        return Arrival(name, self._batches, self._order[: len(self._batches[0])])

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
