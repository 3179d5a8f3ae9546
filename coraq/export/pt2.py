"""torch.export of a network that unpacks its own codes: a `.pt2` file that needs torch and nothing else.

Codes of 2 to 8 bits are held in int32 words (uint8 arithmetic inside a module exports to invalid graphs), and are
multiplied out at every call: small on disk, in eager mode slower than float. Nothing is claimed beyond the file.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coraq.artifact import Checkpoint
from coraq.core.columns import multiplied
from coraq.core.tensors import QTensor
from coraq.errors import CoraqError
from coraq.export.float_graph import quiet
from coraq.export.grids import GridsAsOperator

WORD = 32


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n] → int32 [⌈n / (32 // bits)⌉], the first code lowest; a word's bits that are left over are 0."""
    share = WORD // bits
    padded = torch.zeros(-(-codes.numel() // share) * share, dtype=torch.int64)
    padded[: codes.numel()] = codes.reshape(-1).long()
    words = (padded.view(-1, share) << (torch.arange(share) * bits)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Codes(nn.Module):
    """A QTensor as buffers; called, it gives `dequantize()` bit for bit: float32 [groups, out, in]."""

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        self.bits, self.count, self.shape = q.bits, q.codes.numel(), tuple(q.codes.shape)
        self.steps = 2.0**q.fraction  # of a zero point in a code
        self.register_buffer("packed", pack_words(q.codes, q.bits))
        self.register_buffer("scale", q.scale.clone())
        self.register_buffer("shifts", torch.arange(WORD // q.bits, dtype=torch.int32) * q.bits, persistent=True)
        self.register_buffer("zero_point", None if q.zero_point is None else q.zero_point.clone())
        self.register_buffer("codebook", None if q.codebook is None else q.codebook.clone())
        self.register_buffer("columns", None if q.columns is None else q.columns.clone())

    def forward(self) -> Tensor:
        # an arithmetic shift brings ones in from the left: the mask takes them away
        lanes = (self.packed[:, None] >> self.shifts) & (2**self.bits - 1)  # type: ignore[index, operator]
        codes = lanes.reshape(-1)[: self.count].reshape(self.shape)
        if self.codebook is not None:
            weight = self.codebook[codes.long()] * self.scale  # type: ignore[index, operator]
        else:
            zero = float(2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point.float() / self.steps
            weight = (codes.float() - zero) * self.scale
        return multiplied(weight, self.columns)  # type: ignore[arg-type]


class Unpack(nn.Module):
    """A parametrization: the layer's weight is made of its codes (and its adapter's) whenever it is read."""

    def __init__(self, weight: QTensor, adapter: Any, shape: torch.Size) -> None:
        super().__init__()
        self.codes, self.shape = Codes(weight), tuple(shape)
        self.b = None if adapter is None else Codes(adapter.b)
        self.a = None if adapter is None else Codes(adapter.a)

    def forward(self, placeholder: Tensor) -> Tensor:
        weight: Tensor = self.codes()
        if self.a is not None and self.b is not None:
            weight = weight + self.b() @ self.a()
        return weight.reshape(self.shape)


def unpacking(checkpoint: Checkpoint) -> nn.Module:
    """A copy of the checkpoint's network that holds codes instead of weights."""
    network = copy.deepcopy(checkpoint.module).to(memory_format=torch.contiguous_format)
    modules: dict[str, Any] = dict(network.named_modules())
    for name, layer in checkpoint.layers.items():
        module = modules[name]
        shape = module.weight.shape
        module.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
        parametrize.register_parametrization(module, "weight", Unpack(layer.weight, layer.adapter, shape), unsafe=True)
    return network.eval().requires_grad_(False)


def grid_in_plain_operators(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """`torch.fake_quantize_per_tensor_affine` in operators that every torch.export knows."""
    codes = torch.clamp(torch.round(x * (1.0 / torch.tensor(scale, dtype=torch.float32))) + zero_point, low, high)
    return (codes - zero_point) * scale


def build_pt2(checkpoint: Checkpoint, example: Tensor) -> bytes:
    """The bytes of a `.pt2` with a dynamic batch.

    Raises:
        CoraqError: torch.export cannot trace the network.
    """
    with quiet(), GridsAsOperator(grid_in_plain_operators), torch.no_grad():
        try:
            program = torch.export.export(
                unpacking(checkpoint), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            )
        except Exception as error:  # whatever its passes raise
            text = str(error).strip().splitlines()
            raise CoraqError(
                f"torch.export fails on this network: {text[0][:200] if text else type(error).__name__}",
                "Try --format onnx.",
            ) from error
        strip(program)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    return buffer.getvalue()


def strip(program: Any) -> None:
    """Take out where in whose source each node came from: more bytes than a small network's codes."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(key, None)
    program.example_inputs = None


def open_pt2(content: bytes) -> nn.Module:
    """What anybody gets who opens the file with torch alone."""
    module: nn.Module = torch.export.load(io.BytesIO(content)).module()
    return module


def codes_exact(checkpoint: Checkpoint, opened: nn.Module) -> bool:
    """Whether every code, scale, zero point and codebook in an opened file is the checkpoint's."""
    stored = opened.state_dict()

    def same(prefix: str, q: QTensor) -> bool:
        wanted = {"packed": pack_words(q.codes, q.bits), "scale": q.scale}
        wanted |= {"zero_point": q.zero_point} if q.zero_point is not None else {}
        wanted |= {"codebook": q.codebook} if q.codebook is not None else {}
        wanted |= {"columns": q.columns} if q.columns is not None else {}
        return all(torch.equal(stored[f"{prefix}.{key}"], value) for key, value in wanted.items())

    for name, layer in checkpoint.layers.items():
        prefix = f"{name}.parametrizations.weight.0"
        factors = {"codes": layer.weight}
        if layer.adapter is not None:
            factors |= {"b": layer.adapter.b, "a": layer.adapter.a}
        if not all(same(f"{prefix}.{key}", q) for key, q in factors.items()):
            return False
    return True
