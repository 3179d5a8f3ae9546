"""BatchNorm folding and weight materialisation by observed dataflow, never by class names.

One forward pass is watched. A norm is folded into a convolution when the norm's input *is* the convolution's
output and nobody else reads that output. A convolution whose effective weight is not its parameter (weight
standardisation) becomes a plain one that holds the effective weight. What was done is written down as a
`Structure`, from which `coraq.load` rebuilds the same modules without any data.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import Field
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coraq.config import Frozen
from coraq.errors import CoraqError
from coraq.network.dataflow import METADATA, Dataflow, tensors_in, watch
from coraq.network.layers import is_quantizable

PRODUCTS = {functional.conv1d, functional.conv2d, torch.conv1d, torch.conv2d, functional.linear}
NORMS = {functional.batch_norm, torch.batch_norm}


class Structure(Frozen):
    """How the quantized network's modules differ from timm's: enough to rebuild them without data."""

    materialised: dict[str, bool] = Field(
        default_factory=dict, description="convolutions with a computed weight, made plain; true: TF 'same' padding"
    )
    untied: list[str] = Field(
        default_factory=list, description="layers whose weight was another's Parameter; each has its own copy"
    )
    folded: dict[str, str] = Field(default_factory=dict, description="norm -> the convolution or Linear it went into")


class Trace(Frozen):
    """What one forward pass showed.

    Attributes:
        order: quantizable layers that ran, by first call.
        outputs: output positions (rows of im2col patches) of each for one image.
        structure: what can be folded and must be materialised.
        flow: which tensors the folded network makes, and who reads them (from `fold`).
        computed: layers whose weight depends on the images: they stay float.
    """

    order: list[str]
    outputs: dict[str, int]
    structure: Structure
    flow: Dataflow | None = None
    computed: list[str] = Field(default_factory=list)


class _Observer(TorchFunctionMode):
    """Records who reads the output of each convolution, and with which weight and input each convolution ran."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.produced: dict[int, str] = {}
        self.keep: list[Tensor] = []  # while kept, no other tensor can get the same id
        self.readers: dict[str, list[tuple[Any, str]]] = defaultdict(list)
        self.weights: dict[str, Tensor] = {}
        self.conv_input_shape: dict[str, torch.Size] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in METADATA:
            for tensor in tensors_in((args, kwargs)):
                producer = self.produced.get(id(tensor))
                if producer is not None:
                    self.readers[producer].append((func, self.stack[-1] if self.stack else ""))
        if func in PRODUCTS and self.stack:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.weights.setdefault(self.stack[-1], weight.detach())
            self.conv_input_shape.setdefault(self.stack[-1], (args[0] if args else kwargs["input"]).shape)
        return func(*args, **kwargs)


@torch.no_grad()
def trace(model: nn.Module, example: Tensor) -> tuple[Trace, dict[str, Tensor]]:
    """Watch `model(example)`; returns what it showed and the effective weights of computed-weight convolutions.

    Args:
        example: images [n, channels, height, width].
    """
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    observer = _Observer()
    calls: dict[str, int] = defaultdict(int)
    first_output: dict[str, Tensor] = {}
    input_shape: dict[str, torch.Size] = {}
    norm_input: dict[str, str | None] = {}
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            observer.stack.append(name)
            calls[name] += 1
            if args and isinstance(args[0], Tensor):
                input_shape.setdefault(name, args[0].shape)
                if _is_norm(module):
                    norm_input.setdefault(name, observer.produced.get(id(args[0])))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            observer.stack.pop()
            if is_quantizable(module) and isinstance(output, Tensor):
                first_output.setdefault(name, output)
                observer.produced[id(output)] = name
                observer.keep.append(output)

        return hook

    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    try:
        with observer:
            model(example)
    finally:
        for handle in handles:
            handle.remove()

    images = example.shape[0]
    order = [name for name in first_output if calls[name] >= 1]
    outputs = {name: first_output[name].numel() // max(1, _out_channels(modules[name])) // images for name in order}
    materialised, effective = _materialised(modules, order, observer, input_shape)
    changing = _changing(model, example, effective) if effective else set()
    order = [name for name in order if name not in changing]
    materialised = {name: same for name, same in materialised.items() if name not in changing}
    effective = {name: weight for name, weight in effective.items() if name not in changing}
    folded = _foldable(modules, calls, norm_input, observer)
    folded = {norm: layer for norm, layer in folded.items() if layer not in changing}
    found = Trace(
        order=order,
        outputs=outputs,
        structure=Structure(materialised=materialised, untied=_tied(modules, order), folded=folded),
        computed=sorted(changing),
    )
    return found, effective


def _changing(model: nn.Module, example: Tensor, effective: dict[str, Tensor]) -> set[str]:
    """Layers that do not run with the same weight on different images, nor at each of their calls."""
    flipped = example.flip(-1)
    found = set[str]()
    for images in (example[:1], 3 * flipped - 0.5, 0.25 * example + 1, torch.zeros_like(example)):
        for name, weights in _weights_on(model, images, set(effective)).items():
            reference = effective[name]
            if any(
                w.shape != reference.shape or not torch.allclose(w, reference, rtol=1e-5, atol=1e-7) for w in weights
            ):
                found.add(name)
    return found


def _weights_on(model: nn.Module, images: Tensor, wanted: set[str]) -> dict[str, list[Tensor]]:
    """The weights that these layers run with on some images, one of each call."""
    observer = _Observer()
    found: dict[str, list[Tensor]] = defaultdict(list)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            observer.stack.append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            observer.stack.pop()
            weight = observer.weights.pop(name, None)
            if name in wanted and weight is not None:
                found[name].append(weight.clone())

        return hook

    handles = []
    for name, module in model.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    try:
        with observer:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tied(modules: dict[str, Any], order: list[str]) -> list[str]:
    """Layers whose weight is a Parameter of another module, too: all but the first in order of execution."""
    readers: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            readers[id(parameter)].append(name)
    found, seen = [], set[int]()
    for name in order:
        weight = modules[name]._parameters.get("weight")
        others = [] if weight is None else [other for other in readers[id(weight)] if other != name]
        if others and (id(weight) in seen or any(other not in order for other in others)):
            found.append(name)
        seen.add(id(weight))
    return found


def _materialised(
    modules: dict[str, Any], order: list[str], observer: _Observer, input_shape: dict[str, torch.Size]
) -> tuple[dict[str, bool], dict[str, Tensor]]:
    """Convolutions that did not run with their own weight parameter, and the weight that they ran with."""
    names, effective = {}, {}
    for name in order:
        module, ran_with = modules[name], observer.weights.get(name)
        if ran_with is None:
            continue
        stored = module._parameters.get("weight")  # under weight_norm or a parametrization there is none
        if stored is None or ran_with.data_ptr() != stored.data_ptr():
            linear = isinstance(module, nn.Linear)
            padded_inside = not linear and observer.conv_input_shape[name] != input_shape[name]
            names[name], effective[name] = padded_inside, ran_with.clone()
    return names, effective


def _foldable(
    modules: dict[str, Any], calls: dict[str, int], norm_input: dict[str, str | None], observer: _Observer
) -> dict[str, str]:
    """Norms whose input is a convolution's output that nobody else reads; both run once."""
    folded: dict[str, str] = {}
    for norm, producer in norm_input.items():
        if producer is None or calls[norm] != 1 or calls[producer] != 1 or producer in folded.values():
            continue
        readers = observer.readers[producer]
        inside = all(where == norm and func in NORMS for func, where in readers)
        channels = modules[norm].running_mean.shape[0]
        if len(readers) == 1 and inside and channels == _out_channels(modules[producer]):
            folded[norm] = producer
    return folded


def _is_norm(module: nn.Module) -> bool:
    """A norm over stored statistics: frozen or not, with or without an activation inside."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(
        getattr(module, "running_var", None), Tensor
    )


def _out_channels(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


@torch.no_grad()
def restructure(model: nn.Module, structure: Structure, effective: dict[str, Tensor] | None = None) -> None:
    """Materialise and fold in place, as `structure` says.

    With `effective` (from `trace`) the numbers are right; without, only the modules are, and a checkpoint's
    tensors must be loaded over them.

    Raises:
        CoraqError: `model` has no such modules, or they cannot be changed so.
    """
    try:
        _restructure(model, structure, effective)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if effective is not None:
            raise  # it was traced: a fault of ours
        raise CoraqError(
            f"the network's modules cannot be folded as its file says: {error}",
            "The checkpoint was written for another architecture or timm version, or is damaged.",
        ) from error


def _restructure(model: nn.Module, structure: Structure, effective: dict[str, Tensor] | None) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    missing = [
        name
        for name in (*structure.untied, *structure.materialised, *structure.folded, *structure.folded.values())
        if name not in modules
    ]
    if missing:
        raise CoraqError(
            f"the network has no module {missing[0]!r}",
            "The checkpoint was written for another architecture or timm version.",
        )
    for name in structure.untied:
        weight = modules[name].weight
        modules[name].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    for name, same in structure.materialised.items():
        module = modules[name]
        plain = _plain_linear(module) if isinstance(module, nn.Linear) else _plain_convolution(module, same)
        if effective is not None:
            plain.weight.copy_(effective[name])
        _replace(model, name, plain)
        modules[name] = plain
    for norm, layer in structure.folded.items():
        _fold(modules[layer], modules[norm])
        _replace(model, norm, _remainder(modules[norm]))


def _plain_linear(module: Any) -> nn.Linear:
    """A Linear of the same size whose weight is its parameter."""
    plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    plain.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
    return plain


def _plain_convolution(module: Any, same: bool) -> Any:
    """A convolution of the same geometry whose weight is its parameter."""
    kind: Any = Conv2dSame if same else (nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d)
    plain = kind(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        stride=module.stride,
        padding=0 if same else module.padding,
        dilation=module.dilation,
        groups=module.groups,
        bias=module.bias is not None,
        device="meta",  # no memory, no draw from the global random state
        **({} if same else {"padding_mode": module.padding_mode}),
    )
    # device and memory format of the original: a weight in another format is summed in another order
    plain.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
    return plain


def _fold(layer: Any, norm: Any) -> None:
    """`γ (W x + b − μ) / √(σ² + ε) + β` as one layer, computed in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if getattr(norm, "weight", None) is not None:
        scale = scale * norm.weight.double()
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(scale)
    bias = (bias - norm.running_mean.double()) * scale
    if getattr(norm, "bias", None) is not None:
        bias = bias + norm.bias.double()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)


def _remainder(norm: nn.Module) -> nn.Module:
    """What a norm does beside normalising: its drop and activation, in the order in which it holds them."""
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())


@torch.no_grad()
def fold(model: nn.Module, example: Tensor, tolerance: float = 1e-3) -> Trace:
    """Fold in place all that can be folded, and assert that the function is unchanged on `example`.

    Args:
        example: images [n, channels, height, width]; random ones will do.
        tolerance: largest relative Frobenius error of the output. Past it the comparison is repeated in float64,
            where a badly conditioned network's rounding is gone and a fault stays.

    Raises:
        CoraqError: the folded network computes something else (the network does what folding cannot see).
    """
    original = copy.deepcopy(model)
    before = model(example)
    found, effective = trace(model, example)
    restructure(model, found.structure, effective)
    after, flow = watch(model, example)
    error = relative_error(after, before)
    if not error <= tolerance and not _error_in_float64(original, found.structure, example) <= tolerance:
        raise CoraqError(
            f"folding BatchNorm changed the network's output by {error:.1e} (relative), more than {tolerance:.0e}",
            "Please report the architecture: its forward pass reads a convolution in a way that coraq does not see.",
        )
    return found.model_copy(update={"flow": flow})


def _error_in_float64(original: nn.Module, structure: Structure, example: Tensor) -> float:
    """The relative error that folding makes in double precision; infinite where the network cannot run in it."""
    try:
        model, images = original.double(), example.double()
        before = model(images)
        _, effective = trace(model, images)
        restructure(model, structure, effective)
        return relative_error(model(images), before)
    except (RuntimeError, TypeError):
        return float("inf")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error; NaN or Inf anywhere gives a value that fails every `<=`."""
    # row by row in float32, which is exact enough over one row, and then in float64
    difference, scale = (torch.linalg.vector_norm(x, dim=-1).double().norm() for x in (value - reference, reference))
    return float(difference / scale.clamp(min=1e-30))
