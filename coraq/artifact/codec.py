"""A QuantizedLayer as named tensors and back: the one encoding that layer files and checkpoints share."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from safetensors.torch import save
from torch import Tensor

from coraq.config import MAX_BITS, Frozen
from coraq.core import entropy_coding
from coraq.core.columns import STORED
from coraq.core.packing import pack, unpack
from coraq.core.tensors import ActivationGrid, Coding, LowRank, QTensor, QuantizedLayer, ScaleType
from coraq.errors import CoraqError

# compressed-tensors' names, as far as they go; no compatibility is claimed (it refuses convolutions)
_PACKED, _SCALE, _ZERO, _CODEBOOK, _COLUMNS = "packed", "scale", "zero_point", "codebook", "column_scale"
_CODED = "coded"


class LayerRecord(Frozen):
    """What the tensors alone do not say. Shapes are [groups, out, in]."""

    shape: tuple[int, int, int] = Field(description="shape of the weight's codes")
    bits: int = Field(ge=1, le=MAX_BITS)
    fraction: int = Field(default=0, ge=0, lt=MAX_BITS, description="bits of the zero point behind the point")
    rank: int | None = Field(default=None, ge=0)
    adapter_bits: tuple[int, int] | None = Field(default=None, description="bits of the adapter's B and A")
    input: tuple[float, int, int, bool] | None = Field(
        default=None, description="grid of the layer's input: scale, zero point, bits, signed"
    )
    coding: Coding = Field(default="packed", description="how the weight's codes are stored")

    @model_serializer(mode="wrap")
    def _without_what_format_1_lacks(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Packed layers are written as before there was a choice, so that older versions read them."""
        values: dict[str, Any] = dump(self)
        if self.coding == "packed":
            del values["coding"]
        return values


def serialise(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same contents.

    The library leaves the metadata's order to chance, and refuses tensors that share memory (one codebook for all
    layers, a module of two names).
    """
    seen: set[int] = set()
    for key, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        if address in seen:
            tensors = {**tensors, key: value.clone()}
        seen.add(address)
    content = save(tensors, about)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(about.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


def content_digest(tensors: dict[str, Tensor], *texts: str) -> str:
    """SHA-256, hex, over texts and every tensor's name, type, shape and bytes: finds a flipped bit, not a forger."""
    digest = hashlib.sha256("".join(texts).encode())
    for key in sorted(tensors):
        value = tensors[key].detach().contiguous()
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def encode(name: str, layer: QuantizedLayer) -> tuple[dict[str, Tensor], LayerRecord]:
    """Tensors under `name.weight_packed`, … and the record; the bias, if any, under `name.bias`."""
    tensors = _encode_qtensor(f"{name}.weight_", layer.weight)
    adapter = layer.adapter
    if adapter is not None and adapter.rank:
        tensors |= _encode_qtensor(f"{name}.adapter_b_", adapter.b) | _encode_qtensor(f"{name}.adapter_a_", adapter.a)
    if layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias.contiguous()
    groups, out, inputs = layer.weight.codes.shape
    record = LayerRecord(
        shape=(groups, out, inputs),
        bits=layer.weight.bits,
        fraction=layer.weight.fraction,
        rank=None if adapter is None else adapter.rank,
        adapter_bits=None if adapter is None else (adapter.b.bits, adapter.a.bits),
        input=None if (grid := layer.input) is None else (grid.scale, grid.zero_point, grid.bits, grid.signed),
        coding=layer.weight.coding,
    )
    return tensors, record


def decode(name: str, record: LayerRecord, tensors: dict[str, Tensor]) -> QuantizedLayer:
    """The layer that `encode` was given, bit for bit; takes its tensors out of `tensors`.

    Raises:
        CoraqError: tensors are missing, or do not fit the record.
    """
    try:
        adapter = None
        if record.rank and record.adapter_bits:
            groups, out, inputs = record.shape
            b = _decode_qtensor(f"{name}.adapter_b_", (groups, out, record.rank), record.adapter_bits[0], tensors)
            a = _decode_qtensor(f"{name}.adapter_a_", (groups, record.rank, inputs), record.adapter_bits[1], tensors)
            adapter = LowRank(b, a)
        weight = _decode_qtensor(f"{name}.weight_", record.shape, record.bits, tensors, record.fraction, record.coding)
        bias = tensors.pop(f"{name}.bias", None)
        grid = None if record.input is None else ActivationGrid(*record.input)
        layer = QuantizedLayer(weight, adapter, None if bias is None else bias.float(), grid)
        layer.check(record.shape)
    except KeyError as error:
        raise CoraqError(f"layer {name}: tensor {error} is missing", "The file is damaged or not coraq's.") from None
    except ImportError as error:
        raise CoraqError(f"layer {name}: {error}", "Then open the file again.") from None
    except (ValueError, RuntimeError) as error:
        raise CoraqError(f"layer {name}: {error}", "The file is damaged or not coraq's.") from None
    return layer


def _encode_qtensor(prefix: str, q: QTensor) -> dict[str, Tensor]:
    groups, out, inputs = q.codes.shape
    scale = q.scale.reshape(-1).cpu().contiguous()
    tensors: dict[str, Any] = {prefix + _SCALE: scale.bfloat16() if q.scale_type == "bfloat16" else scale}
    if q.coding == "ans":
        tensors[prefix + _CODED] = entropy_coding.encode(q.codes)
    else:
        tensors[prefix + _PACKED] = pack(q.codes.reshape(groups * out, inputs).cpu(), q.bits)
    if q.zero_point is not None:
        tensors[prefix + _ZERO] = q.zero_point.reshape(-1).cpu().contiguous()
    if q.codebook is not None:
        tensors[prefix + _CODEBOOK] = q.codebook.cpu().contiguous()
    if q.columns is not None:
        tensors[prefix + _COLUMNS] = q.columns.cpu().to(STORED).contiguous()
    return tensors


def _decode_qtensor(
    prefix: str,
    shape: tuple[int, int, int],
    bits: int,
    tensors: dict[str, Tensor],
    fraction: int = 0,
    coding: Coding = "packed",
) -> QTensor:
    groups, out, _ = shape
    codes = _decode_codes(prefix, shape, bits, tensors, coding)
    grid = (1, 1, 1) if tensors[prefix + _SCALE].numel() == 1 else (groups, out, 1)
    scale = tensors.pop(prefix + _SCALE).reshape(grid)
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{prefix}{_SCALE} is {scale.dtype}, not float32 or bfloat16")
    scale_type: ScaleType = "float32" if scale.dtype == torch.float32 else "bfloat16"
    zero = tensors.pop(prefix + _ZERO, None)
    if zero is not None and zero.dtype != torch.uint8:
        raise ValueError(f"{prefix}{_ZERO} is {zero.dtype}, not uint8")
    zero = None if zero is None else zero.reshape(grid)
    columns = tensors.pop(prefix + _COLUMNS, None)
    if columns is not None and columns.dtype != STORED:
        raise ValueError(f"{prefix}{_COLUMNS} is {columns.dtype}, not {STORED}")
    columns = None if columns is None else columns.float()
    codebook = tensors.pop(prefix + _CODEBOOK, None)
    return QTensor(codes, scale.float(), bits, zero, codebook, fraction, columns, coding, scale_type)


def _decode_codes(
    prefix: str, shape: tuple[int, int, int], bits: int, tensors: dict[str, Tensor], coding: Coding
) -> Tensor:
    """Codes uint8 [groups, out, in]; no more memory than the tensors themselves allow for."""
    groups, out, inputs = shape
    if min(shape) < 0:
        raise ValueError(f"no weight has shape {list(shape)}")
    if coding == "ans":
        return entropy_coding.decode(tensors.pop(prefix + _CODED), groups * out * inputs).reshape(shape)
    packed = tensors.pop(prefix + _PACKED)
    if packed.dim() != 2 or packed.shape[0] != groups * out:
        raise ValueError(f"{prefix}{_PACKED} has shape {list(packed.shape)}, not [{groups * out}, …]")
    return unpack(packed, bits, inputs).reshape(shape)
