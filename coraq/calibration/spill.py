"""Activations that are alive, and the file where those wait that exceed the memory bound."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
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
                    _write(self._file, memoryview(_bytes_of(storage.cpu())).cast("B"))
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
                if storage.device.type == "cpu":
                    _read(self._file, memoryview(_bytes_of(storage)).cast("B"))
                else:
                    host = torch.UntypedStorage(slot.size)
                    _read(self._file, memoryview(_bytes_of(host)).cast("B"))
                    storage.copy_(host)

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
    # the address of another device's memory means nothing to the file's system calls, or ends the process
    if storage.device.type != "cpu":
        raise ValueError(f"the bytes of a storage on {storage.device} cannot be read from the host")
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
