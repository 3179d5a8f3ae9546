"""Chooses the images of a run: which to calibrate on, which to evaluate on, and never one for both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

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
    data: DataConfig,
    preprocess: Preprocess,
    num_classes: int | None,
    seed: int,
    sink: Sink = null_sink,
    label_names: Sequence[str] = (),
) -> Images:
    """Opens what `data` names: a folder or dataset spec with its splits, `calib_dir`; with neither, synthetic images.

    Calibration takes `calib_size` images, as evenly over the classes as they allow; a smaller set with the
    same seed is the beginning of a larger one. Where both would come from the same images, calibration takes
    at most half of them and evaluation gets the rest; of images without labels calibration takes all that it wants.
    Fallbacks are sent to `sink` as Notes.

    Args:
        label_names: the network's names of its classes in order, where it has them: classes of the data that are
            called so have these numbers.

    Raises:
        CoraqError: missing, empty or unreadable data; classes that do not fit `num_classes` or the class map.
    """
    opened = _opened(data, preprocess, num_classes, sink, label_names)
    evaluating = opened.evaluating()
    calibrating = opened.calibrating()
    if calibrating is None:
        sink(Note(f"no images given: calibration uses {data.calib_size} synthetic ones, accuracy is not measured"))
        return Images(synthetic_images(data.calib_size, preprocess, seed, data.batch_size), None)
    if evaluating is None:
        chosen = opened.draw(calibrating, np.arange(len(calibrating)), data.calib_size, seed)
        return Images(opened.calibration(calibrating, chosen), None)

    if calibrating.stream is not None and evaluating.stream is not None and calibrating.where == evaluating.where:
        return opened.divided_stream(calibrating, evaluating)
    chosen, keep = opened.divided(calibrating, evaluating, seed)
    _warn_of_slices(data, sink)
    evaluation = opened.evaluation(evaluating, keep, seed) if len(keep) else None
    return Images(opened.calibration(calibrating, chosen), evaluation)


def open_evaluation(
    data: DataConfig,
    calibrated: DataConfig | None,
    preprocess: Preprocess,
    num_classes: int | None,
    seed: int,
    sink: Sink = null_sink,
    label_names: Sequence[str] = (),
) -> ImageSet:
    """The images that `data` names to evaluate on, all but those that a network was calibrated on.

    Args:
        data: has a `data_dir` or a `dataset`.
        calibrated: where the images came from that the network was calibrated on, with the same seed; None: not known,
            nothing is held back.

    Raises:
        CoraqError: as `open_images`, or no image is left.
    """
    opened = _opened(data, preprocess, num_classes, sink, label_names)
    evaluating = opened.evaluating()
    assert evaluating is not None, "no images are named"
    used: set[Hashable] = set()
    if calibrated is not None:
        earlier = _opened(calibrated.model_copy(update={"class_map": None}), preprocess, None, null_sink)
        try:
            if evaluating.stream is not None:
                start = earlier.images_used(evaluating)
                return opened.streamed(evaluating, start, data.eval_size and start + data.eval_size)
            used = earlier.places_used(seed)
        except CoraqError as error:
            sink(Note(f"the run's calibration images cannot be read, so none is left out: {error.message}"))
    keep = np.array([i for i, place in enumerate(evaluating.places) if place not in used], dtype=np.int64)
    if evaluating.stream is None and not len(keep):
        raise CoraqError(
            f"the run was calibrated on all images of {evaluating.where}", "give others: --data-dir FOLDER"
        )
    if len(keep) < len(evaluating.places):
        held_back = len(evaluating.places) - len(keep)
        sink(
            Note(
                f"{held_back} images of {evaluating.where} were used for calibration and are not evaluated",
                "warning",
            )
        )
    return opened.evaluation(evaluating, keep, seed)


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


def _opened(
    data: DataConfig, preprocess: Preprocess, num_classes: int | None, sink: Sink, label_names: Sequence[str] = ()
) -> _Opened:
    if num_classes == 1:
        num_classes = 2  # one logit decides between two
    class_map = read_class_map(data.class_map, num_classes) if data.class_map else None
    return _Opened(data, preprocess, class_map, num_classes, sink, list(label_names))


@dataclass
class _Opened:
    """The settings that every set of one run shares."""

    data: DataConfig
    preprocess: Preprocess
    class_map: ClassMap | None
    num_classes: int | None
    sink: Sink
    label_names: list[str] = field(default_factory=list)

    def evaluating(self) -> Pool | None:
        """All images to evaluate on; None if none are named."""
        named = self.data.data_dir or self.data.dataset
        return self.pool(self.data.split, "--split") if named else None

    def calibrating(self) -> Pool | None:
        """All images to calibrate on; None if none are named."""
        if self.data.calib_dir:
            return self.counted(open_folder(self.data.calib_dir, None, "--calib-dir"))
        named = self.data.data_dir or self.data.dataset
        return self.pool(self.data.calib_split, "--calib-split") if named else None

    def divided(self, calibrating: Pool, evaluating: Pool, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices to calibrate on, and of the others to evaluate on (none: all images have no labels and are used)."""
        candidates, shared = _apart(calibrating, evaluating)
        if len(candidates) and shared:
            self.sink(
                Note(
                    f"{shared} images of {calibrating.where} are also evaluated on: not used for calibration", "warning"
                )
            )
        size = self.data.calib_size
        if len(candidates) or calibrating.stream is not None:
            return self.draw(calibrating, candidates, size, seed), np.arange(len(evaluating))
        unlabelled = not evaluating.class_names
        most = len(calibrating) if unlabelled else max(1, min(len(calibrating), len(evaluating) // 2))
        chosen = self.draw(calibrating, np.arange(len(calibrating)), size if unlabelled else min(size, most), seed)
        used = {calibrating.places[index] for index in chosen}
        keep = np.array([i for i, place in enumerate(evaluating.places) if place not in used], dtype=np.int64)
        if unlabelled:
            if not len(keep):
                self.sink(Note(f"{evaluating.where} has no class folders: accuracy is not measured", "warning"))
            return chosen, keep
        if not len(keep):
            raise CoraqError(f"no image of {evaluating.where} is left to evaluate on", "give a --calib-dir")
        self.sink(
            Note(
                f"calibration has no images but those of {evaluating.where}: calibrating on {len(chosen)} of them "
                f"({size} were asked for), evaluating on the other {len(keep)} only",
                "warning",
            )
        )
        return chosen, keep

    def images_used(self, stream: Pool) -> int:
        """How many images at the beginning of a stream a run with these settings calibrates on."""
        calibrating = self.calibrating()
        if calibrating is None or calibrating.stream is None or calibrating.where != stream.where:
            return 0
        return self.stream_size(calibrating)

    def stream_size(self, pool: Pool) -> int:
        """How many images to calibrate on of a stream that is evaluated, too."""
        return min(self.data.calib_size, len(pool) // 2) if len(pool) else self.data.calib_size

    def places_used(self, seed: int) -> set[Hashable]:
        """Where the images lie that a run with these settings calibrates on."""
        calibrating, evaluating = self.calibrating(), self.evaluating()
        if calibrating is None or calibrating.stream is not None:
            return set()
        if evaluating is None or evaluating.stream is not None:
            chosen = self.draw(calibrating, np.arange(len(calibrating)), self.data.calib_size, seed)
        else:
            chosen, _ = self.divided(calibrating, evaluating, seed)
        return {calibrating.places[index] for index in chosen}

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
            self.sink(Note(f"{pool.where} has only {len(candidates)} calibration images; --calib-size is {size}"))
        rng = np.random.default_rng([seed, CALIBRATION])
        return np.asarray(candidates[balanced(pool.groups[candidates], size, rng)])

    def calibration(self, pool: Pool, chosen: np.ndarray) -> ImageSet:
        if pool.stream is not None:
            return self.streamed(pool, 0, len(chosen))
        try:  # classes matter to methods that train; calibration itself needs none
            numbers = class_numbers(pool.class_names, self.class_map, self.num_classes, pool.where, self.label_names)
        except CoraqError:
            numbers = []
        return self._decoded(pool, chosen, numbers, "")

    def evaluation(self, pool: Pool, keep: np.ndarray, seed: int) -> ImageSet:
        limit = self.data.eval_size
        if pool.stream is not None:
            return self.streamed(pool, 0, limit)
        rest = "" if len(keep) == len(pool) else ", none of them used for calibration"
        if limit is not None and limit < len(keep):
            rng = np.random.default_rng([seed, EVALUATION])
            keep = np.sort(keep[balanced(pool.groups[keep], limit, rng)])
        numbers = []
        if pool.class_names:
            numbers = class_numbers(pool.class_names, self.class_map, self.num_classes, pool.where, self.label_names)
        else:
            self.sink(Note(f"{pool.where} has no class folders: accuracy is not measured", "warning"))
        return self._decoded(pool, keep, numbers, rest)

    def divided_stream(self, calibrating: Pool, evaluating: Pool) -> Images:
        size = self.stream_size(calibrating)
        self.sink(
            Note(
                f"calibration and evaluation both read {evaluating.where}: calibrating on its first {size} images, "
                "evaluating on those after them only",
                "warning",
            )
        )
        stop = None if self.data.eval_size is None else size + self.data.eval_size
        return Images(self.streamed(calibrating, 0, size), self.streamed(evaluating, size, stop))

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

    def streamed(self, pool: Pool, start: int, stop: int | None) -> DecodedImages:
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
