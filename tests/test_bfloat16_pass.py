"""Claims about calibration passes in bfloat16: what is rounded, what is not, and that it changes little else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from support.tasks import make_task
from torch import Tensor, nn
from torch.nn import functional

from coraq import registry
from coraq.calibration.bfloat16_pass import BFloat16Pass, Precision, resolve_precision
from coraq.calibration.lockstep import LockStep, live_bytes
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core import bfloat16
from coraq.core.bfloat16 import convolve, multiply
from coraq.migration import upgrade_config
from coraq.network.fold import fold
from coraq.pipeline.prepare import with_precision
from coraq.testing.networks import random_images, randomise_batchnorm

HALF = torch.bfloat16
ULP = 2**-7  # of bfloat16, relative
CASES: list[tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (functional.conv2d, (2, 6, 9, 7), (8, 6, 1, 1), {}),
    (functional.conv2d, (2, 6, 9, 7), (8, 6, 3, 3), {"stride": 2, "padding": 1}),
    (functional.conv2d, (2, 6, 9, 7), (12, 1, 3, 5), {"padding": (1, 2), "groups": 6}),
    (functional.conv2d, (2, 6, 9, 7), (4, 3, 3, 3), {"dilation": (2, 1), "groups": 2}),
    (functional.conv2d, (2, 6, 9, 7), (4, 6, 3, 3), {"padding": "same"}),
    (functional.conv2d, (6, 9, 7), (4, 6, 3, 3), {}),  # no batch
    (functional.conv1d, (2, 6, 9), (8, 3, 3), {"padding": (1,), "groups": 2}),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_products_are_rounded_once(monkeypatch: pytest.MonkeyPatch, case: Any, native: bool) -> None:
    """Against float64 sums of the same numbers, from a bias that bfloat16 does not have."""
    kind, shape, weights, how = case
    if not native:
        monkeypatch.setattr(bfloat16, "_ONEDNN", False)
    x, weight, bias = drawn(*shape).to(HALF), drawn(*weights, seed=1).to(HALF), 100 + drawn(weights[0], seed=2)
    wanted = kind(x.double(), weight.double(), bias.double(), **how)
    found = convolve(kind, x, weight, bias, **how)
    assert found.dtype == HALF
    assert found.shape == wanted.shape
    # half a unit in the last place, and float32's own sums
    assert float(((found.double() - wanted).abs() / wanted.abs()).max()) <= ULP / 2 * 1.001


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 5, 3, 16)])
def test_linear_products_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], native: bool
) -> None:
    if not native:
        monkeypatch.setattr(bfloat16, "_ONEDNN", False)
    weight, bias = drawn(8, 16, seed=1).to(HALF), 100 + drawn(8, seed=2)
    x = drawn(*reversed(shape)).to(HALF).permute(*reversed(range(len(shape))))  # not contiguous
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    found = multiply(x, weight, bias)
    assert found.dtype == HALF
    assert float(((found.double() - wanted).abs() / wanted.abs()).max()) <= ULP / 2 * 1.001


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("make", [nn.ReLU, nn.ReLU6])
def test_activations_are_clipped_as_torch_does(make: Any, inplace: bool) -> None:
    """Every bfloat16 number but NaN, of 65,536 bit patterns; and by the modules that networks have."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(HALF)
    every = every[~every.isnan()].reshape(2, -1).t()  # not contiguous
    wanted, given = make()(every.clone()), every.clone()
    with BFloat16Pass(torch.device("cpu")):
        found = make(inplace=inplace)(given)
    assert torch.equal(found, wanted)
    assert torch.equal(given, wanted if inplace else every)
    assert torch.equal(make()(drawn(5)), drawn(5).clamp(0, 6))  # float32 stays float32


def test_other_ranges_are_torch_s_own() -> None:
    x = drawn(50).to(HALF)
    with BFloat16Pass(torch.device("cpu")):
        assert torch.equal(functional.hardtanh(x, -1, 1), x.clamp(-1, 1))
        assert torch.equal(functional.relu(x.float()), x.float().clamp(min=0))


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(16, 8, 3, padding=1),
    lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    lambda: nn.Conv2d(16, 8, 1, bias=False),
    lambda: nn.Linear(16, 8),
]


@pytest.mark.parametrize("make", LAYERS)
def test_a_layer_s_mean_output_is_that_of_its_float_weights(make: Callable[[], nn.Module]) -> None:
    """The rounding errors of outputs average out; those of weights and of the bias are not left in the mean."""
    torch.manual_seed(0)
    layer: Any = make()
    x = drawn(64, 16, 20, 20).abs() + 1
    x = x.to(HALF).float()  # the input's own rounding is not the question
    if isinstance(layer, nn.Linear):
        x = x.movedim(1, -1)
    if layer.bias is not None:
        layer.bias.data += 5
    half = BFloat16Pass(torch.device("cpu"))
    half.take(layer, mean_patch(layer, x))
    last = -1 if isinstance(layer, nn.Linear) else 1

    def error(y: Tensor) -> float:
        difference = (y.double() - wanted).movedim(last, 0).flatten(1).mean(1)
        return float(difference.abs().max() / wanted.abs().max())

    with torch.no_grad():
        wanted = copy.deepcopy(layer).double()(x.double())
        with half:
            found = layer(x)
        with torch.autocast("cpu", HALF):
            plain = layer(x)
    assert found.dtype == HALF
    assert error(found) < 5e-5  # 25,600 rounding errors of up to 2⁻⁸ average to 1e-5
    assert error(found) < error(plain) / 10


def mean_patch(layer: Any, x: Tensor) -> Tensor:
    """The mean of a layer's im2col patches, float64 [groups, in], from the layer itself: outputs are linear in it."""
    if isinstance(layer, nn.Linear):
        return x.double().mean((0, 1, 2))[None]
    groups, inputs = layer.groups, layer.weight[0].numel()
    probe = nn.Conv2d(
        layer.in_channels, groups * inputs, layer.kernel_size, padding=layer.padding, groups=groups, bias=False
    ).double()
    probe.weight.data = torch.eye(inputs, dtype=torch.float64).repeat(groups, 1).reshape(probe.weight.shape)
    with torch.no_grad():
        return probe(x.double()).mean((0, 2, 3)).reshape(groups, inputs)


def test_a_layer_that_was_not_taken_multiplies_in_float32() -> None:
    layer, x = nn.Conv2d(3, 4, 3), drawn(2, 3, 8, 8)
    half = BFloat16Pass(torch.device("cpu"))
    with torch.no_grad():
        wanted = layer(x).to(HALF)
        with half:
            found = layer(x)
        assert torch.equal(found, wanted)
        assert layer(x).dtype == torch.float32  # outside all is as it was


def network_and_images(
    name: str = "mobilenetv2_050", count: int = 18, size: int = 32
) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    batches = list(random_images(count, size).split(2))
    randomise_batchnorm(network, torch.Generator().manual_seed(0), batches[0])
    return network, batches


def task_of(name: str = "mobilenetv2_050", **more: Any) -> CalibrationTask:
    network, batches = network_and_images(name)
    found = fold(network, batches[0])
    return make_task(network, Scheme.of(bits=3), batches, found=found, **more)


def test_what_waits_takes_half_of_the_memory() -> None:
    network, batches = network_and_images()
    order = fold(network, batches[0]).order
    full = live_bytes(network, batches[0], order)
    half = live_bytes(network, batches[0], order, within=BFloat16Pass(torch.device("cpu")))
    behind = list(full)[1:]  # the first layer's input are the images themselves
    assert all(2 * half[name] == full[name] for name in behind)


def test_the_hub_is_not_in_bfloat16() -> None:
    """While the passes wait, statistics and solvers compute as they always do."""
    network, batches = network_and_images(count=4)
    order = fold(network, batches[0]).order
    engine = LockStep([network, network], batches, order, within=BFloat16Pass(torch.device("cpu")))
    try:
        for _ in range(3):
            layer_inputs = engine.advance()
            assert layer_inputs is not None
            assert not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert next(iter(layer_inputs.inputs(0))).dtype == HALF
    finally:
        engine.close()


def quantized(task: CalibrationTask, method: str = "comq") -> dict[str, Any]:
    registry.make(method, {}).quantize(task)
    task.finish(method)
    return dict(task.committed)


def test_it_changes_less_than_weights_of_8_bits_do() -> None:
    """Means of every layer's inputs in both networks; a random network of fifty layers multiplies any change."""
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    changed = {}
    for half in (False, True):
        task = task_of(bfloat16=half)
        seen.append({})
        for layer in task.layers:
            stats = task.stats(layer.name)
            seen[-1][layer.name] = stats.teacher_mean, stats.mean
            changed.setdefault(layer.name, stats.input_error)
            task.commit(layer.name, task.quantize_with(layer.name, "rtn", bits=8))
        task.close()
    for name in list(changed)[1:]:
        for exact, found in zip(seen[0][name], seen[1][name], strict=True):
            assert float((found - exact).norm() / exact.norm()) < changed[name], name


@pytest.mark.parametrize("method", ["comq", "brecq"])
def test_a_resumed_run_ends_in_the_same_codes(method: str) -> None:
    whole = quantized(task_of(bfloat16=True, early_images=4), method)
    again = quantized(task_of(bfloat16=True, early_images=4, done=dict(list(whole.items())[:20])), method)
    for name, (layer, _) in whole.items():
        other = again[name][0]
        assert torch.equal(layer.weight.codes, other.weight.codes), name
        assert torch.equal(layer.weight.scale, other.weight.scale), name
        assert torch.equal(layer.bias, other.bias), name


def test_the_precision_is_part_of_the_run() -> None:
    kinds: tuple[Precision, ...] = ("float32", "bfloat16")
    digests = {RunConfig(model="demo", data=DataConfig(calib_precision=kind)).digest() for kind in kinds}
    assert len(digests) == 2


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize(
    ("scheme", "coarse"),
    [
        (Scheme.of(bits=4), True),
        (Scheme.of(bits=2), True),
        (Scheme.of(bits=5), False),
        (Scheme.of(bits=4, act_bits=4), False),
    ],
)
def test_auto_is_bfloat16_for_few_bits_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, scheme: Scheme, coarse: bool, has: bool
) -> None:
    monkeypatch.setattr("coraq.calibration.bfloat16_pass.multiplies_bfloat16", lambda device: has)
    config, cpu = RunConfig(model="demo", scheme=scheme), torch.device("cpu")
    assert with_precision(config, cpu).data.calib_precision == ("bfloat16" if has and coarse else "float32")
    assert resolve_precision("auto", scheme, torch.device("meta")) == "float32"
    assert resolve_precision("bfloat16", scheme, cpu) == "bfloat16"
    assert resolve_precision("float32", scheme, cpu) == "float32"


def test_an_earlier_result_was_in_float32() -> None:
    old = upgrade_config({"version": 1, "data": {"calib_size": 4}})
    assert old["data"]["calib_precision"] == "float32"
