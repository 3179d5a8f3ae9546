"""From the class names that images come with to the class numbers that the network predicts."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data.readers.class_map import load_class_map

from coraq.errors import CoraqError

ClassMap = Mapping[str, int]


def read_class_map(path: str, num_classes: int | None) -> dict[str, int]:
    """Class name to class number, from a text file or, as timm reads it, from a pickled dict.

    A text file holds one name a line in index order, or "name index" on every line. Blank lines at its end
    are ignored.

    Raises:
        CoraqError: missing, empty or malformed file, a name twice, or more classes than `num_classes`; a
            plain list of names must have exactly `num_classes`.
    """
    file = Path(path)
    if not file.is_file():
        wrong = "is no file" if file.exists() else "does not exist"
        raise CoraqError(f"class map {path} {wrong}", "give a text file with one class name a line")
    numbered = True
    if file.suffix.lower() == ".pkl":
        try:
            mapping = {str(name): int(index) for name, index in load_class_map(str(file)).items()}
        except Exception as error:  # unpickling raises anything; timm's reader runs no code of the file
            raise CoraqError(f"class map {path} cannot be read: {error}", "pickle a dict of name to index") from error
    else:
        try:
            content = file.read_bytes()
            marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            text = content.decode("utf-16" if marked else "utf-8-sig")  # both without their byte-order mark
        except (OSError, UnicodeDecodeError) as error:
            raise CoraqError(
                f"class map {path} cannot be read: {error}", "give a text file (UTF-8) with one class name a line"
            ) from error
        lines = [line.strip() for line in text.rstrip().splitlines()]
        pairs = [line.rsplit(maxsplit=1) for line in lines]
        numbered = all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs)
        names = (
            [(name, int(index)) for name, index in pairs] if numbered else [(line, i) for i, line in enumerate(lines)]
        )
        mapping = dict(names)
        if len(mapping) < len(names):
            twice = next(name for name, index in names if mapping[name] != index)
            raise CoraqError(f"class map {path} has {twice!r} twice", "each class name must stand on one line")
    if not mapping:
        raise CoraqError(f"class map {path} is empty", "write one class name a line, in the network's order")
    if num_classes is not None:
        _check_size(path, mapping, numbered, num_classes)
    return mapping


def _check_size(path: str, mapping: ClassMap, numbered: bool, num_classes: int) -> None:
    beyond = [f"{name!r} = {index}" for name, index in mapping.items() if not 0 <= index < num_classes]
    if beyond:
        raise CoraqError(
            f"class map {path} has {len(mapping)} classes, the network has {num_classes}: {_examples(beyond)}",
            "use the map of the data set that the network was trained for",
        )
    if not numbered and len(mapping) != num_classes:
        raise CoraqError(
            f"class map {path} has {len(mapping)} names, the network has {num_classes} classes",
            "to map some classes only, write 'name index' on every line",
        )


def class_numbers(
    found: Sequence[str],
    class_map: ClassMap | None,
    num_classes: int | None,
    where: str,
    label_names: Sequence[str] = (),
) -> list[int]:
    """The network's number of each class in `found` (names in the data's own order).

    The class map says it, or else the network's own `label_names`, where they hold every name of the data once.
    Without either the data's order is the network's, which can be true only if their numbers agree.

    Raises:
        CoraqError: names that the class map misses, or another number of classes than the network has.
    """
    if class_map is not None:
        missing = [repr(name) for name in found if name not in class_map]
        if missing:
            raise CoraqError(
                f"the class map lacks {len(missing)} of the {len(found)} classes of {where}: {_examples(missing)}",
                "add them to the --class-map, or remove their folders",
            )
        return [class_map[name] for name in found]
    if found and all(label_names.count(name) == 1 for name in found):
        return [label_names.index(name) for name in found]
    if num_classes is not None and len(found) != num_classes:
        named = [repr(name or "(files beside the class folders)") for name in found]
        raise CoraqError(
            f"{where} has {len(found)} classes ({_examples(named)}), the network has {num_classes}",
            "give a --class-map with the network's class names in order, or the data that the network was trained for",
        )
    return list(range(len(found)))


def names_in_order(found: Sequence[str], numbers: Sequence[int], class_map: ClassMap | None) -> list[str]:
    """Class names by class number; "" where a number has no name."""
    by_number = {index: name for name, index in (class_map or dict(zip(found, numbers, strict=True))).items()}
    return [by_number.get(index, "") for index in range(max(by_number) + 1)] if by_number else []


def _examples(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", …" if len(items) > 3 else "")
