"""Chooses the images of a run: which to calibrate on, which to evaluate on, and never one for both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coraq.config import DataConfig
from coraq.data.classes import ClassMap, class_numbers, names_in_order, read_class_map
from coraq.data.imageset import UNLABELLED, DecodedImages, Images, ImageSet, digest
from coraq.data.preprocess import Preprocess
from coraq.data.sources import Pool, open_folder, open_spec
from coraq.data.synthetic import synthetic_images
from coraq.errors import CoraqError
from coraq.events import Note, Sink, null_sink

CALIBRATION, EVALUATION = 0, 1  # separate random streams of one seed


def open_images(
    data: DataConfig, preprocess: Preprocess, num_classes: int | None, seed: int, sink: Sink = null_sink
) -> Images:
    """Opens what `data` names: a folder or dataset spec with its splits, `calib_dir`; with neither, synthetic images.

    Calibration takes `calib_size` images, as evenly over the classes as they allow; a smaller set with the
    same seed is the beginning of a larger one. Where both would come from the same images, calibration takes
    at most half of them and evaluation gets the rest. Fallbacks are sent to `sink` as Notes.

    Raises:
        CoraqError: missing, empty or unreadable data; classes that do not fit `num_classes` or the class map.
    """
    if num_classes == 1:
        num_classes = 2  # one logit decides between two
    class_map = read_class_map(data.class_map, num_classes) if data.class_map else None
    opened = _Opened(data, preprocess, class_map, num_classes, sink)
    evaluating = opened.pool(data.split, "--split") if data.data_dir or data.dataset else None
    if data.calib_dir:
        calibrating: Pool | None = opened.counted(open_folder(data.calib_dir, None, "--calib-dir"))
    elif evaluating is not None:
        calibrating = opened.pool(data.calib_split, "--calib-split")
    else:
        calibrating = None
    if calibrating is None:
        sink(Note(f"no images given: calibration uses {data.calib_size} synthetic ones, accuracy is not measured"))
        return Images(synthetic_images(data.calib_size, preprocess, seed, data.batch_size), None)
    if evaluating is None:
        chosen = opened.draw(calibrating, np.arange(len(calibrating)), data.calib_size, seed)
        return Images(opened.calibration(calibrating, chosen), None)

    if calibrating.stream is not None and evaluating.stream is not None and calibrating.where == evaluating.where:
        return opened.divided_stream(calibrating, evaluating)
    candidates, shared = _apart(calibrating, evaluating)
    if len(candidates) and shared:
        sink(Note(f"{shared} images of {calibrating.where} are also evaluated on: not used for calibration", "warning"))
    if len(candidates) or calibrating.stream is not None:
        chosen = opened.draw(calibrating, candidates, data.calib_size, seed)
        keep = np.arange(len(evaluating))
    else:
        most = max(1, min(len(calibrating), len(evaluating) // 2))
        chosen = opened.draw(calibrating, np.arange(len(calibrating)), min(data.calib_size, most), seed)
        used = {calibrating.places[index] for index in chosen}
        keep = np.array([i for i, place in enumerate(evaluating.places) if place not in used], dtype=np.int64)
        if not len(keep):
            raise CoraqError(f"no image of {evaluating.where} is left to evaluate on", "give a --calib-dir")
        sink(
            Note(
                f"calibration has no images but those of {evaluating.where}: calibrating on {len(chosen)} of them "
                f"({data.calib_size} were asked for), evaluating on the other {len(keep)} only",
                "warning",
            )
        )
    _warn_of_slices(data, sink)
    return Images(opened.calibration(calibrating, chosen), opened.evaluation(evaluating, keep, seed))


def balanced(groups: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` of the indices of `groups` (int64 [n], class of each), one class after the other, shuffled by `rng`.

    No class gets two more than another unless that has no more. The choice of a smaller size is a prefix.
    """
    order = rng.permutation(len(groups))
    _, classes = np.unique(groups, return_inverse=True)
    shuffled = classes[order]
    # The how-manieth of its class each image is, in shuffled order: position within its run of a stable sort.
    by_class = np.argsort(shuffled, kind="stable")
    starts = np.searchsorted(shuffled[by_class], np.arange(int(classes.max()) + 1))
    turn = np.empty(len(groups), dtype=np.int64)
    turn[by_class] = np.arange(len(groups)) - starts[shuffled[by_class]]
    return np.asarray(order[np.argsort(turn, kind="stable")][:size])


@dataclass
class _Opened:
    """The settings that every set of one run shares."""

    data: DataConfig
    preprocess: Preprocess
    class_map: ClassMap | None
    num_classes: int | None
    sink: Sink

    def pool(self, split: str, option: str) -> Pool:
        if self.data.dataset:
            return open_spec(self.data.dataset, self.data.data_dir, split, option, self.class_map)
        assert self.data.data_dir is not None
        return self.counted(open_folder(self.data.data_dir, split, "--data-dir", option))

    def counted(self, pool: Pool) -> Pool:
        """The pool, after saying how many pictures are of formats that are not read."""
        if pool.left_out:
            named = ", ".join(pool.left_out[:5]) + (", …" if len(pool.left_out) > 5 else "")
            files = "1 file" if len(pool.left_out) == 1 else f"{len(pool.left_out)} files"
            self.sink(Note(f"{files} in formats that coraq does not read left out: {named}", "warning"))
        return pool

    def draw(self, pool: Pool, candidates: np.ndarray, size: int, seed: int) -> np.ndarray:
        """Indices to calibrate on; a stream has none, its first images are taken."""
        if pool.stream is not None:
            self.sink(Note(f"{pool.where} is a stream: calibrating on its first {size} images"))
            return np.arange(size)
        if size > len(candidates):
            self.sink(Note(f"{pool.where} has {len(candidates)} images to calibrate on, {size} were asked for"))
        rng = np.random.default_rng([seed, CALIBRATION])
        return np.asarray(candidates[balanced(pool.groups[candidates], size, rng)])

    def calibration(self, pool: Pool, chosen: np.ndarray) -> ImageSet:
        if pool.stream is not None:
            return self._streamed(pool, 0, len(chosen))
        try:  # classes matter to methods that train; calibration itself needs none
            numbers = class_numbers(pool.class_names, self.class_map, self.num_classes, pool.where)
        except CoraqError:
            numbers = []
        return self._decoded(pool, chosen, numbers, "")

    def evaluation(self, pool: Pool, keep: np.ndarray, seed: int) -> ImageSet:
        limit = self.data.eval_size
        if pool.stream is not None:
            return self._streamed(pool, 0, limit)
        rest = "" if len(keep) == len(pool) else ", none of them used for calibration"
        if limit is not None and limit < len(keep):
            rng = np.random.default_rng([seed, EVALUATION])
            keep = np.sort(keep[balanced(pool.groups[keep], limit, rng)])
        numbers = []
        if pool.class_names:
            numbers = class_numbers(pool.class_names, self.class_map, self.num_classes, pool.where)
        else:
            self.sink(Note(f"{pool.where} has no class folders: accuracy is not measured", "warning"))
        return self._decoded(pool, keep, numbers, rest)

    def divided_stream(self, calibrating: Pool, evaluating: Pool) -> Images:
        size = self.data.calib_size
        if len(calibrating):
            size = min(size, len(calibrating) // 2)
        self.sink(
            Note(
                f"calibration and evaluation both read {evaluating.where}: calibrating on its first {size} images, "
                "evaluating on those after them only",
                "warning",
            )
        )
        stop = None if self.data.eval_size is None else size + self.data.eval_size
        return Images(self._streamed(calibrating, 0, size), self._streamed(evaluating, size, stop))

    def _decoded(self, pool: Pool, chosen: np.ndarray, numbers: list[int], rest: str) -> DecodedImages:
        assert pool.source is not None
        labels = [numbers[group] for group in pool.groups[chosen]] if numbers else [UNLABELLED] * len(chosen)
        indices = chosen.tolist()
        part = "" if len(chosen) == len(pool) else f"of {len(pool)} "
        plural = "" if len(pool) == 1 else "s"
        return DecodedImages.of_source(
            pool.source,
            indices,
            labels,
            self.preprocess,
            description=f"{len(chosen)} {part}image{plural} of {pool.where}{rest}",
            fingerprint=digest(
                *((pool.source.identity(index), label) for index, label in zip(indices, labels, strict=True))
            ),
            class_names=names_in_order(pool.class_names, numbers, self.class_map) if numbers else None,
            labelled=bool(numbers),
            **self._reading(),
        )

    def _streamed(self, pool: Pool, start: int, stop: int | None) -> DecodedImages:
        assert pool.stream is not None
        available = len(pool)  # 0: the stream does not say
        end = min(stop or available, available) if available else (stop or start)
        return DecodedImages.of_stream(
            pool.stream,
            start,
            stop,
            self.preprocess,
            description=f"{end - start or 'all'} images of {pool.where}"
            + (f", from number {start + 1} on" * bool(start)),
            count=end - start,
            fingerprint=digest(pool.where, start, stop),
            class_names=names_in_order([], [], self.class_map) if self.class_map else None,
            **self._reading(),
        )

    def _reading(self) -> dict[str, object]:
        return {
            "batch_size": self.data.batch_size,
            "workers": self.data.workers,
            "num_classes": self.num_classes,
            "strict": self.data.strict,
            "sink": self.sink,
        }


def _apart(calibrating: Pool, evaluating: Pool) -> tuple[np.ndarray, int]:
    """Indices of the calibration pool that the evaluation pool has not, and the number of those that it has."""
    taken = set(evaluating.places)
    apart = np.array([i for i, place in enumerate(calibrating.places) if place not in taken], dtype=np.int64)
    return apart, len(calibrating.places) - len(apart)


def _warn_of_slices(data: DataConfig, sink: Sink) -> None:
    """Two slices of one split ("train[:100]", "train[50:]") may overlap; only their library knows."""
    names = [split.split("[")[0] for split in (data.split, data.calib_split)]
    if data.dataset and not data.calib_dir and names[0] == names[1] and data.split != data.calib_split:
        sink(
            Note(
                f"{data.split} and {data.calib_split} are parts of one split: coraq cannot tell whether they overlap",
                "warning",
            )
        )
