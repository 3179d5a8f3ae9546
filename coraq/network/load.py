"""Float networks from timm names, the hub, local folders and safetensors files."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from coraq.config import RunConfig
from coraq.errors import CoraqError, UsageError
from coraq.runtime.hub import go_offline_if_unreachable

SPARE_VALUES, SPARE_TENSORS = 1 << 24, 256  # what a network may have beyond what its file implies: 64 MB
SAFETENSORS_ONLY = "coraq opens safetensors only, because unpickling a file can run any code that is in it."


@dataclass(frozen=True)
class FloatModel:
    """A timm network with its weights, and what is needed to build it again without them.

    Attributes:
        module: the network in eval mode, float32.
        architecture: timm's function name; `model_args` go with it to `timm.create_model`.
        pretrained_cfg: timm's data configuration and labels, JSON-able.
        source: what the user asked for.
    """

    module: nn.Module
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    source: str

    @property
    def num_classes(self) -> int:
        return int(getattr(self.module, "num_classes", 0))

    @property
    def label_names(self) -> list[str]:
        """The network's own names of its classes in order; empty if it has none, or not one a class."""
        return names_of(self.pretrained_cfg, self.num_classes)


def load_model(config: RunConfig) -> FloatModel:
    """The float network that `config` names, with pretrained weights, or those of `config.checkpoint`.

    Raises:
        CoraqError: unknown name, unreachable weights, a file that is no safetensors, does not fit, or holds NaN.
    """
    name = config.model
    if name == "demo":
        name = f"local-dir:{resources.files('coraq').joinpath('demo')}"
    arguments = dict(config.model_kwargs)
    if config.num_classes is not None:
        arguments["num_classes"] = config.num_classes
    check_arguments(arguments, config.model)
    architecture, file_args = _locate(name)
    check_arguments(file_args, config.model)
    try:
        with at_most(_size_of(name)):
            module = timm.create_model(name, pretrained=config.checkpoint is None, **arguments)
    except CoraqError:
        raise
    except Exception as error:
        raise _creation_error(config, error) from error
    if config.checkpoint is not None:
        _load_checkpoint(module, Path(config.checkpoint))
    else:
        _check_classifier(module, arguments, config.model)
    if getattr(module, "num_classes", None):
        arguments["num_classes"] = int(module.num_classes)  # type: ignore[arg-type]
    model = FloatModel(module.eval().float(), architecture, {**file_args, **arguments}, _portable(module), config.model)
    check_finite(module, f"the weights of {config.model}")
    return model


def names_of(pretrained_cfg: Mapping[str, Any], num_classes: int) -> list[str]:
    """The `label_names` of a timm configuration; empty unless they are `num_classes` strings."""
    names = pretrained_cfg.get("label_names")
    if not isinstance(names, list) or len(names) != num_classes:
        return []
    return names if all(isinstance(name, str) for name in names) else []


def _check_classifier(module: nn.Module, arguments: Mapping[str, Any], name: str) -> None:
    """Raise unless the classifier is the trained one: timm replaces one of another size by an untrained one.

    Raises:
        UsageError: `arguments` ask for another number of classes than the weights were trained for.
    """
    asked = arguments.get("num_classes")
    trained = (getattr(module, "pretrained_cfg", None) or {}).get("num_classes")
    if asked and isinstance(trained, int) and asked != trained:
        raise UsageError(
            f"--num-classes {asked}: the classifier of {name} is trained for {trained} classes, not {asked}",
            "leave --num-classes out; for a network of your own with that many, give its weights: --checkpoint FILE",
        )


def build(
    architecture: str,
    model_args: dict[str, Any],
    pretrained_cfg: dict[str, Any] | None = None,
    most: Size | None = None,
) -> nn.Module:
    """A timm network without weights. timm takes defaults (classes, pooling) from `pretrained_cfg`, too.

    Args:
        most: of its parameters; more are not allocated. None: as many as it likes.

    Raises:
        CoraqError: this timm does not know the architecture or its arguments, or the network is too large.
    """
    if not architecture.isidentifier() or not timm.is_model(architecture):  # nor a hub's or a folder's name
        raise CoraqError(
            f"timm {timm.__version__} has no architecture {architecture!r}",
            "If a file of your own registers the architecture, name its folder with --plugins-dir (or CORAQ_PLUGINS).",
        )
    check_arguments(model_args, architecture)
    try:
        with at_most(most):
            module: nn.Module = timm.create_model(
                architecture, pretrained=False, pretrained_cfg=pretrained_cfg or None, **model_args
            ).eval()
    except CoraqError:
        raise
    except Exception as error:
        raise CoraqError(
            f"this timm ({timm.__version__}) cannot build {architecture!r}: {_first_line(error)}",
            "If a file of your own registers the architecture, name its folder with --plugins-dir (or CORAQ_PLUGINS).",
        ) from error
    return module


class Size(NamedTuple):
    """How many parameters a network may have, and in how many tensors."""

    values: int
    tensors: int


# timm's own parameters beside the architecture's: they read files, fetch weights, or say what coraq says itself
_NOT_ARGUMENTS = set(inspect.signature(timm.create_model).parameters) - {"kwargs", "scriptable", "exportable", "no_jit"}
_MOST_IN_ARGUMENTS = 1 << 20  # sum of the numbers in them: blocks, channels, classes, pixels


def check_arguments(arguments: Mapping[str, Any], what: str) -> None:
    """Raise unless `arguments` are an architecture's own, with numbers that some network could have.

    Raises:
        UsageError: they would make timm read a file or fetch weights, or their numbers are too large.
    """
    for key in arguments:
        if _reads_files(key):
            raise UsageError(
                f"{key} of {what} is not an argument of an architecture",
                "Weights are named with --checkpoint FILE.safetensors, or by the model's name.",
            )
    size = _sum_of_numbers(arguments)
    if not size <= _MOST_IN_ARGUMENTS:
        raise UsageError(f"the arguments of {what} are too large: their numbers sum to {size:.3g}", "Check its file.")


def _reads_files(key: str) -> bool:
    return key in _NOT_ARGUMENTS or key.startswith("pretrained")


def _sum_of_numbers(value: Any) -> float:
    if isinstance(value, (int, float)):
        return min(abs(value), 1e300)  # a number of a thousand digits is no float
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return sum(_sum_of_numbers(one) for one in inner)


@contextmanager
def at_most(size: Size | None) -> Iterator[None]:
    """Within, a thread that registers more than so many parameters in new modules gets a CoraqError.

    A parameter is registered after it was allocated and before anything is written to it: what is too large never
    takes memory, and a network of too many layers ends at the first one that is too many.
    """
    if size is None:
        yield
        return
    thread, values, tensors = threading.get_ident(), size.values, size.tensors

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread and isinstance(parameter, torch.Tensor):
            nonlocal values, tensors
            values, tensors = values - parameter.numel(), tensors - 1
            if values < 0 or tensors < 0:
                raise CoraqError(
                    f"the network is larger than its file: it has more than {size.values:,} parameters, or more than "
                    f"{size.tensors:,} tensors of them",
                    "The file is damaged, or made to exhaust memory.",
                )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _size_of(name: str) -> Size | None:
    """A bound on a folder's network: its file has a byte for each value, and more than 32 of header for each tensor."""
    if not name.startswith("local-dir:"):
        return None
    size = (Path(name.removeprefix("local-dir:")) / "model.safetensors").stat().st_size
    return Size(size + SPARE_VALUES, size // 32 + SPARE_TENSORS)


def open_folder(folder: Path) -> nn.Module:
    """What timm itself opens a folder as: `timm.create_model("local-dir:…", pretrained=True)`, in eval mode."""
    network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().requires_grad_(False)
    return network


def copy_of(module: nn.Module) -> FloatModel:
    """A user's own module, copied; its architecture is "" if timm did not make it.

    Raises:
        CoraqError: its weights hold NaN or Inf.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    cfg = getattr(module, "pretrained_cfg", None) or {}
    made_with = getattr(module, "_model_args", None) or {}
    arguments = {key: value for key, value in made_with.items() if _is_json(value) and not _reads_files(key)}
    if getattr(module, "num_classes", None):
        arguments["num_classes"] = int(module.num_classes)  # type: ignore[arg-type]
    name = type(module).__name__
    check_finite(module, f"the weights of {name}")
    copied = copy.deepcopy(module).eval().float()
    return FloatModel(copied, str(cfg.get("architecture") or ""), arguments, _portable(module), name)


def _portable(module: nn.Module) -> dict[str, Any]:
    """A module's pretrained_cfg without what JSON cannot hold and what only this machine knows."""
    cfg = dict(getattr(module, "pretrained_cfg", None) or {})
    private = ("file", "source", "state_dict")
    return {key: value for key, value in cfg.items() if key not in private and value is not None and _is_json(value)}


def check_finite(module: nn.Module, what: str) -> None:
    """Raise CoraqError naming the first parameter or buffer that holds NaN or Inf."""
    statistics = ("running_mean", "running_var")
    masks = {key for key, _ in module.named_buffers() if key.rpartition(".")[2] not in statistics}
    for key, tensor in module.state_dict().items():
        if key.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
            raise CoraqError(
                f"{what} are not usable: {key} holds {int((tensor < 0).sum())} negative variances",
                "Use another checkpoint: this one is damaged.",
            )
        if key in masks and not bool(torch.isnan(tensor).any() | torch.isposinf(tensor).any()):
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CoraqError(
                f"{what} are not finite: {key} holds {bad} NaN or Inf of {tensor.numel()} values",
                "Use another checkpoint: no method can quantize a broken one.",
            )


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and stored arguments behind a model name; raises before any slow step where it cannot work."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise CoraqError(
                f"no config.json in {folder}",
                "local-dir: takes a folder with config.json and model.safetensors, as on the hub.",
            )
        if not (folder / "model.safetensors").is_file():
            raise CoraqError(f"no model.safetensors in {folder}", SAFETENSORS_ONLY)
        refuse_pickle(folder / "model.safetensors")
        try:
            _, architecture, arguments = load_model_config_from_path(folder)
            if not isinstance(architecture, str):
                raise TypeError(f"its architecture is no name but {architecture!r:.100}")
            arguments = dict(arguments or {})
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            wrong = f"it has no {error}" if isinstance(error, KeyError) else _first_line(error)
            raise CoraqError(
                f"{folder / 'config.json'} is not a timm configuration: {wrong}",
                'It needs "architecture", and "pretrained_cfg" if the defaults do not fit; copy it from the hub again.',
            ) from error
        if not timm.is_model(architecture):
            raise CoraqError(
                f"timm {timm.__version__} has no architecture {architecture!r} (named by {folder / 'config.json'})",
                _nearest(architecture)
                + "If a file of your own registers it, name that file's folder with --plugins-dir.",
            )
        return architecture, arguments
    if name.startswith(("hf-hub:", "hf_hub:")):
        go_offline_if_unreachable()
        try:
            _, architecture, arguments = load_model_config_from_hf(name.split(":", 1)[1])
        except Exception as error:
            raise CoraqError(f"cannot read {name}: {_first_line(error).split('. ')[0]}", _WAYS_OUT) from error
        return architecture, dict(arguments or {})
    _, architecture = parse_model_name(name)
    architecture = architecture.split(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(
            f"unknown model {name!r}",
            _nearest(architecture) + "`python -c 'import timm; print(timm.list_models())'` lists all.",
        )
    go_offline_if_unreachable()
    return architecture, {}


_WAYS_OUT = (
    "Ways out: --checkpoint FILE.safetensors; local-dir:FOLDER (config.json + model.safetensors); or "
    "`coraq quantize demo`, which needs no network."
)


def _creation_error(config: RunConfig, error: Exception) -> CoraqError:
    text = _first_line(error)
    if isinstance(error, SafetensorError) or "safetensor" in type(error).__name__.lower():
        return CoraqError(f"the weights of {config.model} are damaged: {text}", "Fetch or copy the file again.")
    if isinstance(error, RuntimeError) and "pretrained tag" in text:
        base = config.model.split(".")[0]
        known = ", ".join(timm.list_pretrained(f"{base}.*")[:8])
        return UsageError(f"{config.model}: {text}", f"timm has: {known}" if known else _WAYS_OUT)
    if isinstance(error, RuntimeError) and "No pretrained weights" in text:
        return CoraqError(f"timm has no pretrained weights for {config.model}", _WAYS_OUT)
    if isinstance(error, RuntimeError) and "state_dict" in text:
        return CoraqError(
            f"the weights of {config.model} do not fit its architecture: {_first_line(error, 2)}", _WAYS_OUT
        )
    if isinstance(error, TypeError) and "argument" in text:
        return UsageError(
            f"{config.model} refuses its arguments: {text}", "Check --model-kwargs against the architecture."
        )
    if isinstance(error, OSError):
        return CoraqError(f"the weights of {config.model} cannot be reached: {text.split('. ')[0]}", _WAYS_OUT)
    return CoraqError(f"timm cannot create {config.model}: {text}", _WAYS_OUT)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CoraqError: the file is missing, is a pickle, or is damaged.
    """
    if not path.is_file():
        raise CoraqError(f"no file {path}", "Give the path of a .safetensors file.")
    refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError, MemoryError) as error:
        raise CoraqError(
            f"{path} is damaged or no safetensors file: {_first_line(error)}", "Fetch or copy the file again."
        ) from error


def refuse_pickle(path: Path) -> None:
    """Raise CoraqError if a file is a pickle or a zip of pickles; a safetensors header has a `{` at byte 8."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80"):
        raise CoraqError(
            f"{path} is a pickle, not safetensors",
            SAFETENSORS_ONLY + " Convert it where you trust it: torch.load, then safetensors.torch.save_file.",
        )


def _load_checkpoint(module: nn.Module, path: Path) -> None:
    state = read_safetensors(path)
    own = module.state_dict()
    prefixes = ("module.", "model.", "_orig_mod.", "state_dict.")
    while prefix := next((p for p in prefixes if state and all(key.startswith(p) for key in state)), None):
        if any(key.startswith(prefix) for key in own):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    integers = [k for k, v in state.items() if k in own and own[k].is_floating_point() and not v.is_floating_point()]
    if integers:
        raise CoraqError(
            f"{path}: {integers[0]} is {state[integers[0]].dtype}, where the network has float weights",
            "It looks like a quantized file; coraq starts from float weights.",
        )
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    if missing or unknown:
        example = (
            f"{len(missing)} tensors missing (e.g. {missing[0]})"
            if missing
            else f"{len(unknown)} unknown (e.g. {unknown[0]})"
        )
        raise CoraqError(
            f"{path} is of another architecture: {example}", "Name the architecture that the file was saved from."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise _other_shape(module, path, key, value, own[key])
    module.load_state_dict(state, strict=False)


def _other_shape(module: nn.Module, path: Path, key: str, found: torch.Tensor, wanted: torch.Tensor) -> CoraqError:
    """The error for a tensor of a file that has another shape than the network's."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = (names,) if isinstance(names, str) else tuple(names)
    head = key.rpartition(".")[0]
    if head in heads and found.shape[1:] == wanted.shape[1:]:
        return CoraqError(
            f"the classifier in {path} ({head}) has {len(found)} classes, the network has {len(wanted)}",
            f"--num-classes {len(found)} builds the network that the file is of",
        )
    return CoraqError(
        f"{path}: {key} has shape {list(found.shape)}, the network wants {list(wanted.shape)}",
        "Name the architecture, with its --model-kwargs, that the file was saved from.",
    )


def _nearest(architecture: str) -> str:
    near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
    return f"Did you mean {', '.join(near)}? " if near else ""


def _first_line(error: BaseException, lines: int = 1) -> str:
    text = " ".join(part.strip() for part in str(error).strip().splitlines()[:lines])
    return text or type(error).__name__


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
