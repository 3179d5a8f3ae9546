"""Methods by name: built-ins, entry points, and single-file plugins, all through one door.

Nothing of a method is imported until it is listed or used. Plugin files come from the folders given, from
`CORAQ_PLUGINS`, and from the `plugins/` folder of a source checkout; never from the current folder or from a
checkpoint, which would run strangers' code. A plugin file may also register timm architectures of its own.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from coraq.api import MethodConfig, Quantizer, Scope
from coraq.config import Scheme
from coraq.errors import EXIT_INTERRUPTED, CoraqError, UsageError

BUILT_IN = {
    "rtn": "coraq.methods.rtn:RoundToNearest",
    "comq": "coraq.methods.comq:COMQ",
    "qera": "coraq.methods.qera:QERA",
    "mixed": "coraq.methods.mixed:Mixed",
    "cora": "coraq.methods.cora:CoRa",
    "brecq": "coraq.methods.brecq:BRECQ",
    "qdrop": "coraq.methods.brecq:QDrop",
    "rdoq": "coraq.methods.rdoq:RDOQ",
}
ENTRY_POINTS = "coraq.methods"
IMPORT_S = 60.0  # a plugin that takes longer to import is broken
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes part of a folder's name
REQUIRED = ("name", "summary", "version", "needs_data", "scope", "Config", "quantize")


@dataclass(frozen=True)
class MethodInfo:
    """A line of `coraq methods`. `error` is the traceback or reason where the method cannot be used."""

    name: str
    summary: str
    version: str
    needs_data: bool
    scope: str
    source: str
    error: str | None = None


@dataclass(frozen=True)
class _Found:
    """A method class, or the reason why there is none."""

    name: str
    source: str
    method: type[Quantizer] | None
    error: str | None = None


def plugin_folders(given: Iterable[Path | str] = ()) -> list[Path]:
    """Folders whose `*.py` are plugins, in order.

    Raises:
        UsageError: a folder that was asked for does not exist.
    """
    wanted = [Path(folder) for folder in given]
    wanted += [Path(folder) for folder in os.environ.get("CORAQ_PLUGINS", "").split(os.pathsep) if folder]
    for folder in wanted:
        if not folder.is_dir():
            raise UsageError(f"there is no plugin folder {folder}", "Check --plugins-dir and CORAQ_PLUGINS.")
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "plugins").is_dir():
        wanted.append(checkout / "plugins")
    return list(dict.fromkeys(folder.resolve() for folder in wanted))


def available(plugins_dirs: Iterable[Path | str] = ()) -> dict[str, MethodInfo]:
    """All methods that can be found, broken ones with their error, by name."""
    infos: dict[str, MethodInfo] = {}
    for found in _find(plugins_dirs):
        key = found.name
        if key in infos:
            both = f"two methods are named {key!r}: {infos[key].source} and {found.source}"
            infos[key] = replace(infos[key], error=both)
        elif found.method is None:
            infos[key] = MethodInfo(key, "(broken)", "", False, "", found.source, found.error)
        else:
            method = found.method
            infos[key] = MethodInfo(key, method.summary, method.version, method.needs_data, method.scope, found.source)
    return infos


def load(name: str, plugins_dirs: Iterable[Path | str] = ()) -> type[Quantizer]:
    """A method's class; raises as `find` does."""
    return find(name, plugins_dirs)[0]


def find(name: str, plugins_dirs: Iterable[Path | str] = ()) -> tuple[type[Quantizer], str]:
    """A method's class, and where it comes from.

    Raises:
        UsageError: there is no such method (the nearest are named).
        CoraqError: it is broken, or two methods have that name.
    """
    if name in BUILT_IN and not any(found.name == name for found in _outsiders(plugins_dirs)):
        return _import_object(BUILT_IN[name]), "built-in"
    matches = [found for found in _find(plugins_dirs) if found.name == name]
    if not matches:
        known = sorted({found.name for found in _find(plugins_dirs)})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise UsageError(
            f"unknown method {name!r}",
            (f"Did you mean {', '.join(near)}? " if near else "") + f"There are: {', '.join(known)}.",
        )
    if len(matches) > 1:
        raise CoraqError(
            f"two methods are named {name!r}: {matches[0].source} and {matches[1].source}",
            "Rename or remove one of them.",
        )
    if matches[0].method is None:
        raise CoraqError(
            f"method {name!r} ({matches[0].source}) is broken: {_last_line(matches[0].error)}",
            "`coraq methods` shows its traceback.",
        )
    return matches[0].method, matches[0].source


def plugin_content(method: type) -> str | None:
    """A digest of the file that a method comes from and of the files beside it that it imports, at any depth.

    None for a built-in method, whose version says what it does.
    """
    if method.__module__.startswith("coraq."):
        return None
    file = getattr(sys.modules.get(method.__module__), "__file__", None)
    if file is None or not Path(file).is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(_imported_beside(Path(file).resolve())):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _imported_beside(path: Path) -> set[Path]:
    """A Python file, and the files in its folder and below that it imports, directly or through another."""
    found, left = set[Path](), [path]
    while left:
        here = left.pop()
        if here in found:
            continue
        found.add(here)
        try:
            tree = ast.parse(here.read_bytes())
        except (SyntaxError, ValueError):
            continue
        names = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                names |= {base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # importlib.import_module("name")
                names |= {node.value.removesuffix(".py")} if node.value.removesuffix(".py").isidentifier() else set()
        for name in filter(None, names):
            parts = name.split(".")
            for folder in {path.parent, here.parent}:
                for end in range(1, len(parts) + 1):
                    target = folder.joinpath(*parts[:end])
                    choices = (target.with_suffix(".py"), target / "__init__.py")
                    left += [file.resolve() for file in choices if file.is_file()]
    return found


def make(name: str, options: dict[str, Any]) -> Quantizer:
    """A method, ready to run; raises as `find` and `configure` do."""
    method = load(name)
    return method(configure(method, options))


def configure(method: type[Quantizer], options: dict[str, Any]) -> MethodConfig:
    """A method's Config from its options.

    Raises:
        UsageError: an unknown option (nearest and all named) or a value out of range.
    """
    try:
        return method.Config.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"]) or "options"
        known = list(method.Config.model_fields)
        if first["type"] == "extra_forbidden" and option in method.Config.renamed:
            new = method.Config.renamed[option]
            raise UsageError(
                f"option {option!r} of method {method.name} is now called {new!r}", f"Write -o {new}=VALUE."
            ) from None
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(option, known, n=2, cutoff=0.5)
            hint = (f"Did you mean {', '.join(near)}? " if near else "") + (
                f"{method.name} has: {', '.join(known)}." if known else f"{method.name} has no options."
            )
            raise UsageError(f"method {method.name} has no option {option!r}", hint) from None
        raise UsageError(
            f"option {option} of {method.name} is {first.get('input')!r}: {first['msg']}",
            f"See `coraq methods {method.name}`.",
        ) from None


class ResolvedBase(NamedTuple):
    """A method that another one uses, with its options in full."""

    method: type[Quantizer]
    options: MethodConfig


def resolve_bases(method: type[Quantizer], options: MethodConfig) -> list[ResolvedBase]:
    """All methods that a method uses with these options, and those that they use.

    Raises:
        UsageError: a base whose scope does not fit, or options that it does not have.
        CoraqError: as `find` does, of a base.
    """
    found: list[ResolvedBase] = []
    for base in options.bases():
        used = load(base.method)
        if used.scope not in base.scopes:
            named = f"option {base.option} of {method.name}" if base.option else method.name
            fitting = [info.name for info in available().values() if info.scope in base.scopes]
            raise UsageError(
                f"{named} needs a method of scope {' or '.join(base.scopes)}, and {base.method} has scope {used.scope}",
                f"Methods that fit: {', '.join(fitting)}.",
            )
        own = configure(used, dict(base.options))
        found += [ResolvedBase(used, own), *resolve_bases(used, own)]
    return found


def resolve_auto(scheme: Scheme, method: type[Quantizer], options: MethodConfig) -> Scheme:
    """A run's scheme with what it leaves to the method decided; the bases that the method uses must agree.

    Raises:
        UsageError, CoraqError: as `resolve_bases` does.
    """
    used = [ResolvedBase(method, options), *resolve_bases(method, options)]
    return scheme.resolve_auto(all(_has_column_scales(*one) for one in used), options.edge_bits())


def _has_column_scales(method: type[Quantizer], options: MethodConfig) -> bool:
    says = options.column_scales()
    return hasattr(method, "quantize_layer") if says is None else says


def missing_rivals(names: Iterable[str]) -> list[str]:
    """Methods that these ones ask to be compared with and that are not among them."""
    given = list(dict.fromkeys(names))
    asked = (rival for name in given for rival in getattr(load(name), "compare_with", ()))
    return [rival for rival in dict.fromkeys(asked) if rival not in given]


def import_plugins(plugins_dirs: Iterable[Path | str] = ()) -> list[str]:
    """Import every plugin file, so that architectures they register exist; returns a line for each broken one."""
    broken = []
    for folder in plugin_folders(plugins_dirs):
        for path in sorted(folder.glob("*.py")):
            _, error = _import_file(path)
            if error is not None:
                broken.append(f"plugin {path} is broken and ignored: {_last_line(error)}")
    return broken


def _find(plugins_dirs: Iterable[Path | str]) -> list[_Found]:
    built_in = [_Found(name, "built-in", _import_object(target)) for name, target in BUILT_IN.items()]
    return [*built_in, *_outsiders(plugins_dirs)]


def _outsiders(plugins_dirs: Iterable[Path | str]) -> list[_Found]:
    found = [_from_entry_point(point) for point in entry_points(group=ENTRY_POINTS)]
    for folder in plugin_folders(plugins_dirs):
        for path in sorted(folder.glob("*.py")):
            found += _from_file(path)
    return found


def _from_entry_point(point: EntryPoint) -> _Found:
    source = f"entry point {point.value}" + (f" of {point.dist.name}" if point.dist else "")
    try:
        method = point.load()
    except (Exception, SystemExit):
        return _Found(point.name, source, None, traceback.format_exc())
    return _check(method, source, point.name)


def _from_file(path: Path) -> list[_Found]:
    module, error = _import_file(path)
    if error is not None:
        return [_Found(path.stem, str(path), None, error)]
    methods = getattr(module, "METHODS", [])
    return [_check(method, str(path), path.stem) for method in methods]


def _check(method: Any, source: str, fallback: str) -> _Found:
    missing = [name for name in REQUIRED if not hasattr(method, name)]
    if not missing and not (isinstance(method.Config, type) and issubclass(method.Config, MethodConfig)):
        missing = ["Config, a subclass of coraq.api.MethodConfig"]
    if not missing and method.scope not in get_args(Scope):
        return _Found(method.name, source, None, f"its scope {method.scope!r} is none of {', '.join(get_args(Scope))}")
    if not missing and not (isinstance(method.name, str) and _NAME.fullmatch(method.name)):
        return _Found(fallback, source, None, f"its name {method.name!r} is not of letters, digits, '.', '_' and '-'")
    if missing:
        return _Found(getattr(method, "name", fallback), source, None, f"the method lacks {', '.join(missing)}")
    return _Found(method.name, source, method)


@cache
def _import_file(path: Path) -> tuple[Any, str | None]:
    """The module of a plugin file, once; with a traceback instead where it fails."""
    tag = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"coraq_plugin_{path.stem}_{tag}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look their own module up there
    try:
        with _limited(IMPORT_S, path):
            spec.loader.exec_module(module)
    except (Exception, SystemExit, _TooLong):  # a file that calls sys.exit must not end the program in silence
        del sys.modules[name]
        return None, traceback.format_exc()
    except KeyboardInterrupt:
        raise CoraqError(
            f"interrupted while the plugin {path} was imported",
            "If it hangs: mend it, or take it out of its folder.",
            EXIT_INTERRUPTED,
        ) from None
    return module, None


class _TooLong(BaseException):
    """Not an Exception: a plugin's own handlers must not swallow it."""


@contextmanager
def _limited(seconds: float, path: Path) -> Iterator[None]:
    """Ends an import that hangs, where signals can be had: in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise _TooLong(f"its import takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # once a second until it gives up
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def _import_object(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _last_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[-1] if text and text.strip() else "unknown reason"
