"""Numbers that break solvers: finite results, no worse than nearest rounding where a method says so, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tasks import make_task, run_method
from torch import Tensor, nn

import coraq
from coraq.api import QuantizedLayer, minmax_grid
from coraq.calibration.task import CalibrationTask
from coraq.config import Scheme
from coraq.errors import CoraqError
from coraq.network.fold import fold
from coraq.testing import random_images, small_network

PLUGINS = Path(__file__).parents[1] / "plugins"
OPTIONS: dict[str, dict[str, Any]] = {"brecq": {"iterations": 4}, "qdrop": {"iterations": 4}}
METHODS = ["rtn", "comq", "cora", "qera", "gptq", "npot", "brecq"]  # qdrop is brecq's code with another start
LAYERWISE = ["comq", "qera", "cora", "gptq"]  # those that minimise a layer's own output error


def modules(model: nn.Module) -> dict[str, Any]:
    return dict(model.named_modules())


def plain(model: nn.Module) -> None:
    pass


def zero_and_constant_channels(model: nn.Module) -> None:
    layers = modules(model)
    layers["dense"].weight[1] = 0
    layers["dense"].weight[2] = 0.3
    layers["pointwise"].weight[:] = 0
    layers["grouped"].weight[:4] = -0.2
    layers["head"].weight[:, 3] = 0


def duplicate_inputs(model: nn.Module) -> None:
    """Channels that are copies of others: every Gram behind them is rank-deficient."""
    layers = modules(model)
    for value in (layers["stem"].weight, *layers["stem_norm"].state_dict().values()):
        if value.dim():
            value[1:] = value[:1]
    layers["hidden"].weight[:, 1] = layers["hidden"].weight[:, 0]


def ill_conditioned(model: nn.Module) -> None:
    """Channels from 1 to 1e-8: Grams of condition 1e16."""
    layers = modules(model)
    for name in ("stem_norm", "grouped_norm", "preactivation"):
        norm = layers[name]
        factor = torch.logspace(0, -8, norm.weight.numel())
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)


def dead(model: nn.Module) -> None:
    """Activations that are zero for every image."""
    layers = modules(model)
    layers["stem_norm"].bias[:] = -1e3
    layers["dense"].bias[:] = -1e3


def nearly_dead_norms(model: nn.Module) -> None:
    for name in ("stem_norm", "pointwise_norm"):
        modules(model)[name].running_var[:] = 0


def scaled(factor: float, *names: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and (name in names or not names):
                module.weight.mul_(factor)
                if module.bias is not None:
                    module.bias.mul_(factor)

    return change


def one_outlier(model: nn.Module) -> None:
    modules(model)["dense"].weight[0, 0, 0, 0] = 1e8
    modules(model)["hidden"].weight[0, 0] = -1e-30


def denormal(model: nn.Module) -> None:
    modules(model)["dense"].weight.mul_(1e-38)
    modules(model)["head"].weight[0] = 1e-44


class Thin(nn.Module):
    """Channels, kernels and features of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 1
        self.first, self.norm = nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)
        self.deep, self.last = nn.Conv2d(1, 1, 3, groups=1, padding=1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.deep(self.norm(self.first(x)).relu()).mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[nn.Module], None]] = {
    "plain": plain,
    "zero and constant channels": zero_and_constant_channels,
    "duplicate inputs": duplicate_inputs,
    "condition 1e16": ill_conditioned,
    "dead activations": dead,
    "variances of zero": nearly_dead_norms,
    "weights × 1e6": scaled(1e6, "grouped", "dense"),
    "weights × 1e-6": scaled(1e-6, "grouped", "dense"),
    "all weights × 1e-6": scaled(1e-6),
    "one outlier": one_outlier,
    "denormal weights": denormal,
}
IMAGES: dict[str, Tensor] = {
    "six": random_images(6),
    "one": random_images(1),
    "black": torch.zeros(3, 3, 16, 16),
    "huge": 1e6 * random_images(3),
    "tiny": 1e-12 * random_images(3),
}


def network(change: Callable[[nn.Module], None]) -> nn.Module:
    model = small_network()
    with torch.no_grad():
        change(model)
    return model


class Judged(CalibrationTask):
    """Compares every layer that is committed with nearest rounding, on the same inputs."""

    worse: list[str]
    shrinkage = 0.0  # of the Gram that errors are judged by
    own_grid: bool  # the method's grid is the min-max one of its target: nearest rounding is on that, too

    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        squares = self.least_squares(name).shrunk(self.shrinkage)
        nearest = self.quantize_with(name, "rtn", bits=layer.weight.bits)
        if self.own_grid:
            bits, scheme = layer.weight.bits, self.scheme
            grid = minmax_grid(
                squares.weight, bits, scheme.weights.symmetric, fraction=scheme.fraction(bits, searched=False)
            )
            nearest = QuantizedLayer(grid.pack(grid.codes(squares.weight)))
        errors = [float(squares.error(one.dequantize()).sum()) for one in (layer, nearest)]
        scale = float(squares.energy())
        # a millionth of the layer's output is rounding of the sums themselves
        if not errors[0] <= errors[1] * (1 + 1e-3) + 1e-6 * scale:  # NaN is worse, too
            self.worse.append(f"{name}: {errors[0]:.3g}, nearest rounding {errors[1]:.3g}, signal {scale:.3g}")
        super().commit(name, layer, **metrics)


def judged(
    method: str, model: nn.Module, images: Tensor, scheme: Scheme, shrinkage: float = 0.0
) -> tuple[CalibrationTask, list[str]]:
    found = fold(model, images[:2])
    task = make_task(model, scheme, list(images.split(4)), found=found, kind=Judged)
    assert isinstance(task, Judged)
    task.worse, task.own_grid, task.shrinkage = [], method == "gptq", shrinkage
    run_method(task, method, OPTIONS.get(method, {}))
    return task, task.worse


def assert_finite(task: CalibrationTask) -> None:
    for name, (layer, _) in task.committed.items():
        assert torch.isfinite(layer.dequantize()).all(), name
        assert layer.bias is None or torch.isfinite(layer.bias).all(), name


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_awkward_networks_give_finite_layers(method: str, case: str) -> None:
    task, worse = judged(method, network(NETWORKS[case]), IMAGES["six"], Scheme.of(bits=2, zero_point_fraction=0))
    assert_finite(task)
    if method in LAYERWISE:
        assert not worse, worse


@pytest.mark.parametrize("case", NETWORKS)
def test_awkward_networks_take_zero_points_between_codes(case: str) -> None:
    """Judged by the shrunk Gram, which comq goes by."""
    task, worse = judged("comq", network(NETWORKS[case]), IMAGES["six"], Scheme.of(bits=2), shrinkage=1.0)
    assert_finite(task)
    assert not worse, worse


@pytest.mark.parametrize("case", [name for name in IMAGES if name != "six"])
@pytest.mark.parametrize("method", METHODS)
def test_awkward_images_give_finite_layers(method: str, case: str) -> None:
    task, worse = judged(method, small_network(), IMAGES[case], Scheme.of(bits=3, symmetric=True))
    assert_finite(task)
    if method in LAYERWISE:
        assert not worse, worse


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_size_one_are_quantized(method: str) -> None:
    torch.manual_seed(0)
    task, worse = judged(method, Thin().eval(), IMAGES["six"], Scheme.of(bits=2, first_bits=None, last_bits=None))
    assert_finite(task)
    if method in LAYERWISE:
        assert not worse, worse


@pytest.mark.parametrize("method", METHODS)
def test_activation_grids_stay_finite_on_dead_and_constant_tensors(method: str) -> None:
    model = network(lambda net: (zero_and_constant_channels(net), dead(net))[0])
    task, _ = judged(method, model, IMAGES["six"], Scheme.of(bits=4, act_bits=2, act_placement="integer"))
    assert_finite(task)
    assert all(record.scale > 0 for record in task.activations.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "cora"])
def test_half_precision_networks_are_quantized_as_their_float_values(method: str, dtype: torch.dtype) -> None:
    half = small_network().to(dtype)
    single = copy.deepcopy(half).float()
    results = [coraq.quantize(model, method, data=random_images(4)).module for model in (half, single)]
    for key, value in results[0].state_dict().items():
        assert torch.equal(value, results[1].state_dict()[key]), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["stem.weight", "head.bias", "preactivation.running_var"])
def test_weights_that_are_no_numbers_are_refused(value: float, place: str) -> None:
    model = small_network()
    model.state_dict()[place].view(-1)[0] = value
    with pytest.raises(CoraqError, match=place.replace(".", r"\.")):
        coraq.quantize(model, "rtn", data=random_images(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_no_numbers_are_refused(value: float) -> None:
    images = random_images(2)
    images[1, 0, 3, 3] = value
    with pytest.raises(CoraqError, match="infinite or undefined"):
        coraq.quantize(small_network(), "rtn", data=images)


@pytest.mark.parametrize("method", ["rtn", "comq", "cora", "qera", "gptq", "brecq"])
def test_a_network_whose_activations_overflow_is_refused_by_name(method: str) -> None:
    with pytest.raises(CoraqError, match=r"of \w+ are not finite") as caught:
        coraq.quantize(network(scaled(1e6)), method, data=random_images(2), options=OPTIONS.get(method, {}))
    assert caught.value.hint


@pytest.mark.parametrize("method", ["comq", "cora"])
def test_activations_that_overflow_for_some_images_only_are_refused_at_their_layer(method: str) -> None:
    images = random_images(4)
    images[2] *= 1e37  # finite itself, and nearest rounding's means are; second moments are not
    model = small_network()
    with pytest.raises(CoraqError, match=r"not finite") as caught:
        coraq.quantize(model, method, data=images, options=OPTIONS.get(method, {}))
    assert caught.value.hint
