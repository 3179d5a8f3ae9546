"""What several runs of one process have in common: the float network, its images, its logits.

A comparison runs many cells on one network and one set of images. `RunCache` lets `pipeline.run` load, fold, decode and
evaluate these once, without changing any result: the same tensors in the same batches, and the same notes in every
cell's report as a run of its own would have written.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from coraq.data import Batch, Images, ImageSet
from coraq.errors import CoraqError
from coraq.events import Event, ListSink, Note, Sink, null_sink, tee

T = TypeVar("T")


@dataclass(frozen=True)
class _Made:
    """Something that was made, under which key, and the notes that this sent."""

    key: tuple[Any, ...]
    value: Any
    notes: list[Event]


class RunCache:
    """Keeps for the next run of this process what the last one has loaded; without `keep_bytes`, nothing.

    A run calls `begin`, then asks for things by slot and key with the function that makes them. Each slot holds the
    last key only. Notes that were sent while a thing was made are sent again to each later run that takes it, and a
    CoraqError is raised again.

    Args:
        keep_bytes: decoded images are kept up to so many bytes for each set; a larger set is decoded again.
    """

    def __init__(self, keep_bytes: int | None = None) -> None:
        self.keep_bytes = keep_bytes
        self.turn = 0
        self.sink: Sink = null_sink
        self._made: dict[str, _Made] = {}
        self._failed: dict[tuple[Any, ...], CoraqError] = {}

    def begin(self, sink: Sink) -> None:
        """The next run starts; its notes go to `sink`."""
        self.turn += 1
        self.sink = sink

    def get(self, slot: str, key: tuple[Any, ...], make: Callable[[Sink], T]) -> T:
        """What `make` returns, made anew only where the slot's last key was another."""
        if self.keep_bytes is None:
            return make(self.sink)
        if (slot, *key) in self._failed:
            raise self._failed[slot, *key]
        made = self._made.get(slot)
        if made is not None and made.key == key:
            for note in made.notes:
                self.sink(note)
            return made.value
        self._made.pop(slot, None)  # before the next is loaded: both need not fit
        heard = ListSink()
        try:
            value = make(tee(self._relay, heard))
        except CoraqError as error:
            self._failed[slot, *key] = error
            raise
        self._made[slot] = _Made(key, value, [event for event in heard.events if isinstance(event, Note)])
        return value

    def forget(self) -> None:
        """Drop everything that was kept."""
        self._made.clear()

    def images(self, open_images: Callable[[Sink], Images]) -> Callable[[Sink], Images]:
        """`open_images`, whose sets are then decoded once for all runs."""
        keep_bytes = self.keep_bytes
        if keep_bytes is None:
            return open_images

        def open_kept(sink: Sink) -> Images:
            while_reading = ListSink()
            opened = open_images(tee(sink, while_reading))
            sets = [
                None if images is None else KeptImages(images, keep_bytes, self, while_reading)
                for images in (opened.calibration, opened.evaluation)
            ]
            assert sets[0] is not None
            return Images(sets[0], sets[1])

        return open_kept

    def _relay(self, event: Event) -> None:
        """Outlives a run: what was opened in one run sends its notes to the run that reads it."""
        self.sink(event)


class KeptImages(ImageSet):
    """An ImageSet that is decoded once and then read from memory, channels last, if it fits `keep_bytes`.

    Args:
        heard: has all notes that the set sends while it is read, so that later runs get them, too.
    """

    def __init__(self, images: ImageSet, keep_bytes: int, shared: RunCache, heard: ListSink) -> None:
        super().__init__(
            description=images.description,
            count=images.count,
            fingerprint=images.fingerprint,
            batch_size=images.batch_size,
            class_names=images.class_names,
            labelled=images.labelled,
        )
        self.synthetic, self.skipped = images.synthetic, images.skipped
        self._images, self._keep_bytes, self._shared, self._heard = images, keep_bytes, shared, heard
        self._kept: dict[int, list[Batch]] = {}  # by batch size
        self._notes: list[Event] = []
        self._told = shared.turn  # the run that has had the notes

    def _read(self, batch_size: int) -> Iterator[Batch]:
        if self._told != self._shared.turn:  # a set of the run's own would have told it now
            self._told = self._shared.turn
            for note in self._notes:
                self._shared.sink(note)
        if batch_size in self._kept:
            yield from self._kept[batch_size]
            return
        keeping: list[Batch] | None = None
        before = len(self._heard.events)
        try:
            with contextlib.closing(self._images.batches(batch_size)) as batches:  # type: ignore[type-var]
                for index, (pixels, labels) in enumerate(batches):
                    pixels = pixels.contiguous(memory_format=torch.channels_last)
                    if index == 0 and self.count * pixels[0].numel() * pixels.element_size() <= self._keep_bytes:
                        keeping = []
                    if keeping is not None:
                        keeping.append((pixels, labels))
                    yield pixels, labels
            if keeping is not None:  # read to its end
                self._kept[batch_size] = keeping
        finally:
            self._notes += [event for event in self._heard.events[before:] if isinstance(event, Note)]


def weights_checksum(network: nn.Module) -> int:
    """A checksum of all weights: shows whether a method changed the float network that others need."""
    checksum = 0
    for value in network.state_dict().values():
        data = value.detach().cpu().contiguous().reshape(-1)
        checksum = zlib.crc32(data.view(torch.uint8).numpy().data if data.numel() else b"", checksum)
    return checksum
