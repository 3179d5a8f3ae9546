"""Opens folders, tar files and timm dataset specs: pictures by number, their classes, and who they are."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import IterableImageDataset, create_dataset

from coraq.data.classes import ClassMap
from coraq.data.imageset import Source
from coraq.data.pictures import EXTENSIONS, UNSUPPORTED, picture_extensions
from coraq.data.splits import check_torch_split, split_folder
from coraq.errors import CoraqError, UsageError
from coraq.runtime.hub import go_offline_if_unreachable

KINDS = ("torch", "hfds", "hfids", "wds", "tfds")  # what timm's specs begin with; it takes others for folders
NEEDS_ROOT = ("torch", "wds", "tfds")  # specs that find nothing without --data-dir
PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


class FileSource(Source):
    """Image files under a folder."""

    def __init__(self, root: str, paths: list[str]) -> None:
        self.root, self.paths = root, paths

    def open(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def identity(self, index: int) -> tuple[str, int]:
        path = self.paths[index]
        return Path(os.path.relpath(path, self.root)).as_posix(), os.path.getsize(path)

    def places(self) -> list[Hashable]:
        """The real path of each file, at about one system call a file and not one a path component."""
        folders: dict[str, str] = {}
        found: list[Hashable] = []
        for path in self.paths:
            folder, name = os.path.split(path)
            if os.path.islink(path):
                found.append(os.path.realpath(path))
                continue
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            found.append(os.path.join(folders[folder], name))
        return found


class ReaderSource(Source):
    """Images inside one of timm's readers (a tar file, a Hugging Face data set), or of a torchvision data set."""

    def __init__(self, spec: str, dataset: Any) -> None:
        self.spec, self.dataset = spec, dataset
        self.reader = getattr(dataset, "reader", None)

    def open(self, index: int) -> Image.Image:
        if self.reader is None:
            image: Image.Image = self.dataset[index][0]
            return image
        return Image.open(self.reader[index][0])

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def identity(self, index: int) -> tuple[str, int]:
        return self.spec, index

    def places(self) -> list[Hashable]:
        return [(self.spec, index) for index in range(len(self.dataset))]


@dataclass
class Pool:
    """All images of one split.

    Attributes:
        where: what a person calls it: a folder, or spec and split.
        source: pictures by number; None for a stream.
        groups: int64 [n], each picture's class in the data's own order.
        class_names: names of these classes; empty where the data has no classes.
        stream: a data set that can be read from its beginning only.
        places: where each picture lies, to find pictures that two pools share.
        left_out: paths of pictures in formats that are not read.
    """

    where: str
    source: FileSource | ReaderSource | None
    groups: np.ndarray
    class_names: list[str]
    stream: Iterable[tuple[Any, Any]] | None = None
    places: list[Hashable] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.groups)


def open_folder(root: str, split: str | None, option: str, split_option: str = "--split") -> Pool:
    """Images of a folder or tar file; with `split`, of its sub-folder of that name or one of timm's synonyms.

    A folder without sub-folders for splits is taken whole where `split` is what it is by default.

    Raises:
        CoraqError: it does not exist, cannot be read, holds no images, or has no such split.
    """
    if not os.path.exists(root):
        raise CoraqError(f"{option} {root} does not exist", _nearest(Path(root)))
    if os.path.isfile(root) and Path(root).suffix != ".tar":
        raise CoraqError(
            f"{option} {root} is a file", "give a folder with one sub-folder a class, or a .tar file of one"
        )
    if not os.access(root, os.R_OK | (os.X_OK if os.path.isdir(root) else 0)):
        raise CoraqError(f"{option} {root} cannot be read", "check its permissions")
    if split is not None:
        root = split_folder(root, split, split_option)
    try:
        with picture_extensions():
            dataset = create_dataset("", root=root, split="", search_split=False)
    except RuntimeError as error:
        raise CoraqError(f"{option} {root} holds no images", _other_files(root)) from error
    reader = dataset.reader
    if not len(reader):
        raise CoraqError(f"{option} {root} holds no images", _other_files(root))
    if os.path.isfile(root):
        reader.cache_tarfiles = False  # workers must not share one file's position
        names = [str(reader.class_idx_to_name[i]) for i in range(len(reader.class_idx_to_name))]
        source: FileSource | ReaderSource = ReaderSource(root, dataset)
        groups = np.asarray(reader.targets, dtype=np.int64)
        places: list[Hashable] = [(os.path.realpath(root), index) for index in range(len(groups))]
    else:
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        source = FileSource(reader.root, [path for path, _ in reader.samples])
        groups = np.fromiter((label for _, label in reader.samples), np.int64, len(reader.samples))
        places = source.places()
    flat = names in ([""], ["."])
    left_out = [] if os.path.isfile(root) else _files_of(root, UNSUPPORTED)
    return Pool(_shown(reader.root), source, groups, [] if flat else names, places=places, left_out=left_out)


def _files_of(root: str, extensions: Iterable[str]) -> list[str]:
    wanted = tuple(extensions)
    return sorted(
        os.path.join(folder, name)
        for folder, _, files in os.walk(root, followlinks=True)
        for name in files
        if name.lower().endswith(wanted)
    )


def open_spec(spec: str, root: str | None, split: str, option: str, class_map: ClassMap | None) -> Pool:
    """Images of a timm dataset spec. A stream gets the class map at once, as its labels come with its pictures.

    Raises:
        CoraqError: timm cannot open it, or its labels are no class numbers.
    """
    prefix = spec.partition("/")[0].lower()
    where = f"{spec} ({split})" + (f" in {root}" if root else "")
    if prefix not in KINDS:
        raise UsageError(
            f"--dataset {spec} is not a dataset specification",
            f"write one of {', '.join(f'{kind}/NAME' for kind in KINDS)}; for a folder of images give --data-dir alone",
        )
    if prefix in NEEDS_ROOT and not root:
        raise UsageError(f"--dataset {spec} needs a folder", "say where its files are: --data-dir FOLDER")
    if prefix in ("hfds", "hfids"):
        go_offline_if_unreachable()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # timm's readers print; stdout is for results
            streaming = prefix in ("hfids", "tfds", "wds")
            mapped: Any = _by_label(class_map) if class_map and streaming else None
            # Streams would convert pictures to 8 bits themselves, and wrongly those of 16: they shall hand them on.
            undecoded: dict[str, Any] = {"input_img_mode": ""} if prefix in ("hfids", "wds") else {}
            if prefix == "torch":
                root = check_torch_split(spec, root, split, option)
            with picture_extensions():
                dataset = create_dataset(spec, root=root, split=split, class_map=mapped, **undecoded)
    except ImportError as error:
        package = PACKAGES.get(prefix, str(error.name or error))
        raise CoraqError(f"--dataset {spec} needs the package {package}", f"pip install {package}") from error
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CoraqError(
            f"--dataset {spec}, split {split!r}, cannot be opened: {reason}",
            f"check --dataset, --data-dir and {option}",
        ) from error
    if isinstance(dataset, IterableImageDataset):
        return Pool(where, None, np.zeros(len(dataset), np.int64), [], stream=dataset)
    labels, names = _labels(dataset, where)
    if hasattr(dataset, "samples") and hasattr(dataset, "root"):  # torchvision's ImageFolder and its like
        source: FileSource | ReaderSource = FileSource(str(dataset.root), [str(path) for path, _ in dataset.samples])
    else:
        side = getattr(dataset, "train", split)  # torchvision's own notion where it has one
        source = ReaderSource(f"{spec}:{side}", dataset)
    return Pool(where, source, labels, names, places=source.places())


def _by_label(class_map: ClassMap) -> dict[str | int, int]:
    """The class map for labels that come as names or as numbers."""
    mapped: dict[str | int, int] = {}
    for name, index in class_map.items():
        mapped[name] = index
        if name.isdecimal():
            mapped[int(name)] = index
    return mapped


def _labels(dataset: Any, where: str) -> tuple[np.ndarray, list[str]]:
    reader = getattr(dataset, "reader", None)
    if reader is not None:
        raw = list(reader.iter_targets())
        by_name: dict[str, int] = dict(reader.class_to_idx)
        names = sorted((str(name) for name in by_name), key=lambda name: by_name.get(name, 0))
    else:
        targets = getattr(dataset, "targets", None)
        raw = [dataset[index][1] for index in range(len(dataset))] if targets is None else list(targets)
        names = [name if isinstance(name, str) else str(name[0]) for name in getattr(dataset, "classes", [])]
    try:
        labels = np.array([int(label) for label in raw], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise CoraqError(
            f"the labels of {where} are not class numbers", "coraq evaluates one class an image"
        ) from error
    if not len(labels):
        raise CoraqError(f"{where} has no images", "check --split and --calib-split")
    return labels, names or [str(index) for index in range(int(labels.max()) + 1)]


def _shown(path: str) -> str:
    return path.rstrip("/" + os.sep) or path


def _nearest(path: Path) -> str:
    """A hint: what there is where the first missing part of `path` was expected."""
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    with contextlib.suppress(OSError):
        there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
        close = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
        if close:
            return "did you mean " + " or ".join(str(parent / name) for name in close) + "?"
        if there:
            return f"{parent} has {', '.join(there[:5])}" + (", …" if len(there) > 5 else "")
    return f"the nearest folder that exists is {parent}"


def _other_files(root: str) -> str:
    known = EXTENSIONS
    hint = f"coraq reads {', '.join(known)}"
    if os.path.isfile(root):
        return hint
    found = {Path(name).suffix.lower() for _, _, files in os.walk(root, followlinks=True) for name in files}
    other = sorted(found - set(known) - {""})
    return f"{hint}; the files there are {', '.join(other[:5])}" if other else f"{hint}; no files are there"
