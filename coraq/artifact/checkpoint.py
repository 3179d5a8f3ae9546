"""The checkpoint: one safetensors file with packed codes, the float rest, and all that rebuilding the network needs.

Metadata key "coraq" holds a JSON `CheckpointInfo`; key "sha256" a digest over every tensor's name, type, shape and
bytes and that JSON, so that a flipped bit is found and not served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coraq.activations.records import ActivationRecord, install_grids
from coraq.artifact.codec import LayerRecord, content_digest, decode, encode, serialise
from coraq.artifact.files import write_atomic
from coraq.config import Frozen, Scheme
from coraq.core.tensors import Coding, QTensor, QuantizedLayer
from coraq.errors import CoraqError
from coraq.migration import upgrade_checkpoint
from coraq.network.fold import Structure, restructure
from coraq.network.layers import install
from coraq.network.load import SPARE_TENSORS, SPARE_VALUES, Size, build, check_finite, refuse_pickle


class CheckpointInfo(Frozen):
    """What the metadata says: enough to rebuild the network and to know how it was made."""

    format_version: Literal[2, 3] = Field(default=2, description="3: some layers are entropy-coded")
    architecture: str = Field(description="timm's function name")
    model_args: dict[str, Any] = Field(default_factory=dict, description="go with it to timm.create_model")
    pretrained_cfg: dict[str, Any] = Field(default_factory=dict, description="timm's data configuration and labels")
    preprocess: dict[str, Any] = Field(default_factory=dict, description="how images were prepared")
    structure: Structure = Structure()
    scheme: Scheme = Scheme()
    layers: dict[str, LayerRecord] = Field(default_factory=dict, description="quantized layers in execution order")
    activations: dict[str, ActivationRecord] = Field(
        default_factory=dict, description="grids of activation tensors, each where it acts"
    )
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="command, versions, method, options, seed, data"
    )

    @model_validator(mode="before")
    @classmethod
    def _upgrade(cls, content: Any) -> Any:
        return upgrade_checkpoint(content)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the network with its effective weights, its codes, and its metadata."""

    module: nn.Module
    layers: dict[str, QuantizedLayer]
    info: CheckpointInfo
    path: Path
    size_bytes: int


def write_checkpoint(
    path: Path,
    student: nn.Module,
    layers: dict[str, QuantizedLayer],
    info: CheckpointInfo,
    float_dtype: torch.dtype = torch.float32,
) -> int:
    """Write a checkpoint atomically; returns its size in bytes.

    Args:
        student: the network that the layers are installed in; all but their weights and biases is stored as it is.
        float_dtype: of the float rest; tensors that would overflow in it stay float32.

    Raises:
        CoraqError: no room or no permission.
    """
    content = _content(student, layers, info, float_dtype)
    write_atomic(path, content)
    return len(content)


def bytes_besides_layers(
    student: nn.Module,
    shapes: Mapping[str, tuple[int, int, int]],
    info: CheckpointInfo,
    float_dtype: torch.dtype = torch.float32,
    coding: Coding = "packed",
    zero_points: bool = False,
) -> int:
    """What a checkpoint takes besides `QuantizedLayer.size_bytes` of its layers, rounded up by a few bytes a tensor.

    Args:
        shapes: of the layers' weights, [groups, out, in], by name; every layer is taken to have a bias.
        zero_points: whether layers have them.
    """
    layers = {}
    for name, (groups, out, inputs) in shapes.items():
        zero = torch.zeros(groups, out, 1, dtype=torch.uint8) if zero_points else None
        codes = torch.zeros(groups, out, inputs, dtype=torch.uint8)
        weight = QTensor(codes, torch.ones(groups, out, 1), 8, zero, coding=coding)
        layers[name] = QuantizedLayer(weight, bias=torch.zeros(groups * out))
    whole = len(_content(student, layers, info, float_dtype)) - sum(layer.size_bytes() for layer in layers.values())
    return whole + 8 * len(shapes)  # digits of places in the file


def _content(
    student: nn.Module, layers: dict[str, QuantizedLayer], info: CheckpointInfo, float_dtype: torch.dtype
) -> bytes:
    tensors: dict[str, Tensor] = {}
    records: dict[str, LayerRecord] = {}
    for name, layer in layers.items():
        encoded, records[name] = encode(name, layer)
        tensors |= encoded
    for key, value in student.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if not (owner in layers and leaf in ("weight", "bias")):
            tensors[key] = value.detach().cpu().contiguous()
    tensors = {key: _rest(key, value, float_dtype) for key, value in tensors.items()}
    coded = any(record.coding != "packed" for record in records.values())
    text = info.model_copy(update={"layers": records, "format_version": 3 if coded else 2}).model_dump_json()
    return serialise(tensors, {"coraq": text, "sha256": content_digest(tensors, text)})


def _rest(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """The float rest in its type; codes, scales and whatever is not float32 as they are."""
    ours = key.rpartition(".")[2].startswith(("weight_", "adapter_"))
    if ours or value.dtype != torch.float32 or dtype == torch.float32:
        return value
    small = value.to(dtype)
    return small if bool(torch.isfinite(small).all()) else value


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, or the one of a run folder.

    Raises:
        CoraqError: missing, a pickle, truncated, changed since it was written, not coraq's, not finite, or not
            buildable here.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    tensors, info = read_checkpoint(path)
    layers = {name: decode(name, record, tensors) for name, record in info.layers.items()}
    held = sum(value.numel() for value in tensors.values())
    held += sum(layer.weight.codes.numel() + math.prod(layer.weight.codes.shape[:2]) for layer in layers.values())
    # folding takes four values a channel out of a network, each of which has a weight at least
    most = Size(4 * held + SPARE_VALUES, 8 * len(info.layers) + len(tensors) + SPARE_TENSORS)
    module = build(info.architecture, info.model_args, info.pretrained_cfg, most)
    restructure(module, info.structure)
    _fill(module, layers, tensors, path)
    check_finite(module, f"the tensors of {path}")
    install_grids(module, info.activations, layers)
    return Checkpoint(module.eval().requires_grad_(False), layers, info, path, path.stat().st_size)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """A checkpoint's tensors and metadata, checksum verified; builds no network."""
    if not path.is_file():
        raise CoraqError(f"there is no checkpoint {path}", "Name a run folder or its model.safetensors.")
    refuse_pickle(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        digest = content_digest(tensors, metadata.get("coraq", ""))
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CoraqError(
            f"{path} is damaged: {str(error).splitlines()[0]}", "Run the command that wrote it again."
        ) from error
    if "coraq" not in metadata:
        raise CoraqError(f"{path} is not a coraq checkpoint", "Float weights go to --checkpoint of `coraq quantize`.")
    if metadata.get("sha256") != digest:
        raise CoraqError(
            f"{path} is damaged: its contents do not match their checksum", "Run the command that wrote it again."
        )
    try:
        info = CheckpointInfo.model_validate_json(metadata["coraq"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CoraqError(
            f"{path}: metadata {where}: {first['msg']}", "It may come from a newer coraq: upgrade."
        ) from error
    return tensors, info


@torch.no_grad()
def _fill(module: nn.Module, layers: dict[str, QuantizedLayer], tensors: dict[str, Tensor], path: Path) -> None:
    """Install the layers and the float rest; every tensor of the network must be in the file, and the reverse."""
    modules: dict[str, Any] = dict(module.named_modules())
    for name, layer in layers.items():
        if name not in modules or not isinstance(getattr(modules[name], "weight", None), Tensor):
            raise CoraqError(
                f"{path} is of another architecture: no layer {name!r}", "Was timm changed since? See its provenance."
            )
        groups, out, _ = layer.weight.codes.shape
        own = modules[name].weight
        if own.numel() != layer.weight.codes.numel() or own.shape[:1] != (groups * out,):
            raise CoraqError(f"{path}: layer {name} has another shape in this architecture", "Was timm changed since?")
        install(modules[name], layer.dequantize(), layer.bias)
    own = {
        key: value
        for key, value in module.state_dict().items()
        if not (key.rpartition(".")[0] in layers and key.rpartition(".")[2] in ("weight", "bias"))
    }
    wrong = sorted(set(own) ^ set(tensors)) or [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        raise CoraqError(
            f"{path} is of another architecture: {len(wrong)} tensors differ, e.g. {wrong[0]}",
            "Was timm changed since?",
        )
    for key, value in own.items():
        if value.is_floating_point() != tensors[key].is_floating_point():
            raise CoraqError(f"{path}: {key} is {tensors[key].dtype}, not {value.dtype}", "The file is damaged.")
        value.copy_(tensors[key])
