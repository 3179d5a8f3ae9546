"""A set of images that can be read again and again, in the same order, by any number of workers."""

from __future__ import annotations

import hashlib
import math
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from coraq.data.pictures import as_shown
from coraq.data.preprocess import Preprocess
from coraq.errors import CoraqError
from coraq.events import Note, Sink, null_sink
from coraq.runtime.processors import processors

Batch: TypeAlias = tuple[Tensor, Tensor]  # float32 [n, channels, height, width] normalised, int64 [n]
UNLABELLED = -1

# What PIL and its decoders raise on files that are no image, are cut short, or are built to exhaust memory.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def digest(*parts: object) -> str:
    """12 hex digits over `parts`."""
    content = hashlib.sha256()
    for part in parts:
        content.update(repr(part).encode())
        content.update(b"\0")
    return content.hexdigest()[:12]


class ImageSet(ABC):
    """Images with labels, normalised for one network.

    Attributes:
        description: one human line, "1000 images of ../shared/assets/imagenet-sample".
        count: images in the set, unreadable ones included (they are not known before they are read).
        fingerprint: 12 hex digits; the same images in the same order have the same, whatever reads them.
        class_names: names in index order, where known.
        labelled: whether labels mean anything; else all are -1.
        skipped: path and reason of each unreadable image, filled while iterating.
        synthetic: made on the spot, no real images.
    """

    synthetic = False

    def __init__(
        self,
        *,
        description: str,
        count: int,
        fingerprint: str,
        batch_size: int,
        class_names: list[str] | None = None,
        labelled: bool = True,
    ) -> None:
        self.description = description
        self.count = count
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.class_names = class_names
        self.labelled = labelled
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return self.count

    def counted(self) -> str:
        """The description, and how many of the images could not be read: known after they have been read."""
        unreadable = f", {len(self.skipped)} of them unreadable" if self.skipped else ""
        return self.description + unreadable

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """Normalised float32 [n, channels, height, width] and int64 labels [n], n at most `batch_size`."""
        return self._read(batch_size or self.batch_size)

    @abstractmethod
    def _read(self, batch_size: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Images:
    """What a run sees: images to calibrate on, and others to evaluate on (None: accuracy is not measured)."""

    calibration: ImageSet
    evaluation: ImageSet | None


class Source(Protocol):
    """Pictures by number. Travels to worker processes, so it must pickle."""

    def open(self, index: int) -> Image.Image:
        """The picture; it may still be undecoded. Raises one of UNREADABLE."""

    def name(self, index: int) -> str:
        """What a person finds the picture by."""


@dataclass(frozen=True)
class Corrupt:
    """Stands for a picture that could not be decoded."""

    name: str
    reason: str


Sample: TypeAlias = tuple[Tensor, int] | Corrupt


class _Decoding(Dataset[Sample]):
    """Decodes and transforms the chosen pictures of a source, in order."""

    def __init__(self, source: Source, indices: Sequence[int], labels: Sequence[int], preprocess: Preprocess) -> None:
        self.source, self.indices, self.labels = source, indices, labels
        self.transform, self.image_mode = preprocess.transform(), preprocess.image_mode

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample:
        index = self.indices[position]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with self.source.open(index) as picture:
                    image = self.transform(as_shown(picture, self.image_mode))
        except UNREADABLE as error:
            return Corrupt(self.source.name(index), str(error) or type(error).__name__)
        return image, self.labels[position]


class _Streaming(IterableDataset[Sample]):
    """Samples start to stop of a dataset that can only be read from its beginning."""

    def __init__(self, stream: Iterable[tuple[Any, Any]], start: int, stop: int | None, preprocess: Preprocess) -> None:
        self.stream, self.start, self.stop = stream, start, stop
        self.transform, self.image_mode = preprocess.transform(), preprocess.image_mode

    def __iter__(self) -> Iterator[Sample]:
        for picture, label in islice(self.stream, self.start, self.stop):
            yield self.transform(as_shown(picture, self.image_mode)), UNLABELLED if label is None else int(label)


def _collate(samples: list[Sample]) -> tuple[Tensor | None, Tensor, list[Corrupt]]:
    good = [sample for sample in samples if not isinstance(sample, Corrupt)]
    corrupt = [sample for sample in samples if isinstance(sample, Corrupt)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), corrupt


class DecodedImages(ImageSet):
    """An ImageSet whose pictures are decoded while it is read, in worker processes if `workers` is not 0.

    Args:
        source: pictures by number, or a stream of (picture, label) that can be read again.
        indices, labels: of the chosen pictures; for a stream `indices` is (start, stop).
        num_classes: labels must be smaller.
        strict: an unreadable picture raises a CoraqError instead of being skipped with a Note.
    """

    def __init__(
        self,
        dataset: _Decoding | _Streaming,
        *,
        workers: int,
        num_classes: int | None = None,
        strict: bool = False,
        sink: Sink = null_sink,
        **attributes: Any,
    ) -> None:
        super().__init__(**attributes)
        self._dataset, self._num_classes, self._strict, self._sink = dataset, num_classes, strict, sink
        # Two workers would each read the whole stream, or half of its shards: the order would depend on them.
        self._workers = min(workers, 1) if isinstance(dataset, _Streaming) else workers
        self._seen: set[str] = set()

    @classmethod
    def of_source(
        cls, source: Source, indices: Sequence[int], labels: Sequence[int], preprocess: Preprocess, **more: Any
    ) -> DecodedImages:
        return cls(_Decoding(source, indices, labels, preprocess), count=len(indices), **more)

    @classmethod
    def of_stream(
        cls,
        stream: Iterable[tuple[Any, Any]],
        start: int,
        stop: int | None,
        preprocess: Preprocess,
        **more: Any,
    ) -> DecodedImages:
        return cls(_Streaming(stream, start, stop, preprocess), **more)

    def _read(self, batch_size: int) -> Iterator[Batch]:
        # A process costs more than a batch: no more workers than batches, nor than processors that this process may
        # use. PyTorch gives each worker one thread.
        workers = min(self._workers, processors())
        if self.count:
            workers = min(workers, math.ceil(self.count / batch_size) - 1)
        loader: DataLoader[Any] = DataLoader(
            self._dataset, batch_size=batch_size, num_workers=max(workers, 0), collate_fn=_collate
        )
        fresh: list[Corrupt] = []
        read = 0
        try:
            for images, labels, corrupt in loader:
                for sample in corrupt:
                    self._skip(sample, fresh)
                if images is None:
                    continue
                self._check_labels(labels)
                read += len(images)
                yield images, labels
        except CoraqError:
            raise
        except Exception as error:
            if not isinstance(self._dataset, _Streaming):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]  # a stranger's reader raises anything
            raise CoraqError(
                f"the {self.description} cannot be read: {type(error).__name__}: {reason[-1]}",
                "check the files of --data-dir, --split and --class-map",
            ) from error
        finally:
            if fresh:
                named = ", ".join(sample.name for sample in fresh[:5]) + (", …" if len(fresh) > 5 else "")
                plural = "s" if len(fresh) > 1 else ""
                self._sink(Note(f"{len(fresh)} unreadable image{plural} skipped: {named}", "warning"))
        if not read:
            raise CoraqError(
                f"none of the {self.description} could be read",
                f"the first failed with: {self.skipped[0]}" if self.skipped else "check that the files are images",
            )

    def _skip(self, sample: Corrupt, fresh: list[Corrupt]) -> None:
        if self._strict:
            raise CoraqError(
                f"unreadable image {sample.name}: {sample.reason}",
                "repair or remove the file, or run without --strict to skip it",
            )
        if sample.name not in self._seen:
            self._seen.add(sample.name)
            self.skipped.append(f"{sample.name}: {sample.reason}")
            fresh.append(sample)

    def _check_labels(self, labels: Tensor) -> None:
        if self._num_classes is not None and len(labels) and int(labels.max()) >= self._num_classes:
            raise CoraqError(
                f"a label of {self.description} is {int(labels.max())}, the network has {self._num_classes} classes",
                "give a --class-map with the network's class names in order, or the data that it was trained for",
            )


class TensorImages(ImageSet):
    """An ImageSet of batches that lie in memory, regrouped to the batch size asked for."""

    def __init__(self, chunks: list[Batch], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._chunks = chunks

    def _read(self, batch_size: int) -> Iterator[Batch]:
        pending: list[Batch] = []
        held = 0
        for images, labels in self._chunks:
            for part in zip(images.split(batch_size), labels.split(batch_size), strict=True):
                if held + len(part[1]) > batch_size:
                    yield _joined(pending)
                    pending, held = [], 0
                pending.append(part)
                held += len(part[1])
        if pending:
            yield _joined(pending)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def tensor_images(
    data: Tensor | Iterable[Any], limit: int | None = 1024, batch_size: int = 32, description: str | None = None
) -> ImageSet:
    """Wraps a tensor, a DataLoader or any iterable of batches for the Python API.

    A batch is images, or a tuple or list of (images, labels, …): float [n, channels, height, width], already
    normalised as the network expects. The iterable is read once, up to `limit` images, and kept: a loader
    that shuffles would otherwise show other images at each pass.

    `data` itself may be one such tensor or pair.

    Raises:
        CoraqError: no images, not floating point, not four-dimensional, shapes that differ, or not finite.
    """
    whole = isinstance(data, Tensor) or (
        isinstance(data, tuple)
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
        and data[1].dim() != 4  # that would be a second batch, not the labels of the first
    )
    chunks: list[Batch] = []
    count, labelled = 0, True
    for batch in [data] if whole else data:
        images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if isinstance(batch, (tuple, list)) and len(batch) != 2:
            images, labels = batch[0], (batch[1] if len(batch) > 1 else None)
        images = _checked(images, chunks)
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            labels = labels.detach().to("cpu", torch.int64)
        else:  # absent, or soft labels and other targets that accuracy cannot be counted with
            labels, labelled = torch.full((len(images),), UNLABELLED), False
        if len(labels) != len(images):
            raise CoraqError(f"a batch has {len(images)} images and {len(labels)} labels", "give one label an image")
        room = len(images) if limit is None else limit - count
        chunks.append((images[:room], labels[:room]))
        count += len(chunks[-1][1])
        if limit is not None and count >= limit:
            break
    if not count:
        raise CoraqError("the data given has no images", "an iterator can be read once only: give the loader itself")
    content, targets = hashlib.sha256(), hashlib.sha256()  # apart, so that the batching does not show
    for images, labels in chunks:
        content.update(images.contiguous().numpy().tobytes())
        targets.update(labels.numpy().tobytes())
    return TensorImages(
        chunks,
        description=description or f"{count} images given as tensors",
        count=count,
        fingerprint=digest(list(chunks[0][0].shape[1:]), content.hexdigest(), targets.hexdigest()),
        batch_size=batch_size,
        labelled=labelled,
    )


def _checked(images: Any, chunks: list[Batch]) -> Tensor:
    if not isinstance(images, Tensor):
        raise CoraqError(
            f"a batch is a {type(images).__name__}, not a tensor", "give batches of images, or (images, labels)"
        )
    if images.dim() != 4 or (chunks and images.shape[1:] != chunks[0][0].shape[1:]):
        expected = list(chunks[0][0].shape[1:]) if chunks else "[channels, height, width]"
        raise CoraqError(f"a batch has shape {list(images.shape)}", f"images must be [n, {expected}]")
    if not images.is_floating_point():
        raise CoraqError(f"images are {images.dtype}", "normalise them to floating point, as the network expects")
    images = images.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(images).all()):
        raise CoraqError("images contain infinite or undefined values", "check how they are normalised")
    return images
