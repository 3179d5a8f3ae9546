"""Splits of a folder or of a torchvision data set: found by name, or an error that lists those that are there."""

from __future__ import annotations

import os

from coraq.config import DataConfig
from coraq.errors import CoraqError

# timm's synonyms: a split is found under any name of its own group.
TRAIN = ("train", "training")
EVALUATION = ("val", "valid", "validation", "eval", "evaluation")
TEST = ("test", "testing")
OTHERS = ("dev", "holdout", "calib", "calibration", "unlabeled", "unlabelled")
DEFAULTS = {DataConfig.model_fields[name].default for name in ("split", "calib_split")}
FOLDERS = ("image_folder", "folder")  # torchvision's reader of folders, as timm's specs name it
TWO_SIDED = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")  # training images and test images


def split_folder(root: str, split: str, option: str) -> str:
    """The sub-folder of `root` that holds a split, or `root` itself where it holds classes and no splits.

    Args:
        option: the command-line option that named the split.

    Raises:
        CoraqError: `root` has other splits and not this one, or a split was asked for by name that it has not.
    """
    name = split.split("[")[0]
    if os.path.isdir(root):
        group = next((names for names in (TRAIN, EVALUATION) if name in names), ())
        for candidate in (name, *group):
            path = os.path.join(root, candidate)
            if name and os.path.isdir(path):
                return path
    there = _splits_of(root)
    if not there and split in DEFAULTS:
        return root
    if there:
        listed = ", ".join(there)
        hint = f"give {option} {' or '.join(there)}"
        if option == "--calib-split":
            hint += ", or a --calib-dir; a split that is evaluated, too, is divided between both"
        raise CoraqError(f"{root} has no split {split!r}; it has {listed}", hint)
    hint = f"leave {option} out: all images there are then used"
    if os.path.isdir(root):
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        found = ", ".join(folders[:5]) + (", …" if len(folders) > 5 else "") if folders else "no folders"
        raise CoraqError(f"{root} has no split {split!r}; it has {found}", hint)
    raise CoraqError(f"{root} is one file, which has no split {split!r}", hint)


def _splits_of(root: str) -> list[str]:
    """Sub-folders that are splits and not classes: by name, and by holding folders or having only such neighbours."""
    if not os.path.isdir(root):
        return []
    known = {*TRAIN, *EVALUATION, *TEST, *OTHERS}
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    named = [name for name in folders if name.lower() in known]
    if len(named) == len(folders):
        return named
    return [name for name in named if any(entry.is_dir() for entry in os.scandir(os.path.join(root, name)))]


def check_torch_split(spec: str, root: str | None, split: str, option: str) -> str | None:
    """The folder for a torchvision data set; those that know training and test images only take no other split.

    Raises:
        CoraqError: the data set has no such split. timm would read its test images, or all images of a folder.
    """
    name = spec.partition("/")[2].lower()
    if name in FOLDERS and root is not None:
        return split_folder(root, split, option)
    known = (*TRAIN, *EVALUATION, *TEST)
    if name in TWO_SIDED and split not in known:
        raise CoraqError(f"{spec} has no split {split!r}; it has train and test", f"give {option} train or test")
    return root
