"""Units of reconstruction: every layer in exactly one, and each can be run by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.examples_folder import example
from torch import Tensor, nn

from coraq.calibration.block_data import cut_out
from coraq.cli.app import run as command
from coraq.errors import UsageError
from coraq.network.blocks import Block, partition
from coraq.network.fold import Trace, fold
from coraq.testing import random_images, randomise_batchnorm, small_network

families = example("families")
FAST = ["resnet50", "resnetv2_50", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_b0", "regnety_002"]
FAST += ["convnext_atto", "densenet121", "dla46_c", "ghostnet_050", "res2net50_26w_4s", "edgenext_xx_small"]


def units_stand_alone(model: nn.Module, found: Trace, units: list[Block], images: Tensor) -> None:
    """Each unit, cut out and fed what it was fed in the network, gives what it gave in the network."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    fed: dict[str, Tensor] = {}
    handles: list[Any] = []
    for unit in units:
        module = model.get_submodule(unit.module)

        def before(module: nn.Module, args: tuple[Any, ...], name: str = unit.module) -> None:
            fed.setdefault(name, args[0].clone())

        def after(module: nn.Module, args: tuple[Any, ...], y: Any, name: str = unit.module) -> None:
            assert isinstance(y, Tensor)
            seen.setdefault(name, (fed[name], y.clone()))

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    assert sorted(name for unit in units for name in unit.layers) == sorted(found.order)
    starts = [found.order.index(unit.layers[0]) for unit in units]
    assert starts == sorted(starts)
    for unit in units:
        copy = cut_out(model, unit)
        for name in unit.layers:
            assert torch.equal(copy.get_submodule(unit.inner(name)).weight, model.get_submodule(name).weight)
        with torch.no_grad():
            x, y = seen[unit.module]
            torch.testing.assert_close(copy(x.clone()), y, rtol=1e-4, atol=1e-4)


def check(family: Any) -> None:
    network, images = families.build(family), families.images(family)[:2]
    found = fold(network, images)
    for granularity in ("layer", "block", "stage"):
        units = partition(network, found.order, found.flow, granularity)  # type: ignore[arg-type]
        units_stand_alone(network, found, units, images)


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f.architecture in FAST], ids=lambda f: f.name)
def test_every_layer_is_in_one_unit_that_runs_by_itself(family: Any) -> None:
    check(family)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f.architecture not in FAST], ids=lambda f: f.name)
def test_every_other_family_too(family: Any) -> None:
    check(family)


def resnet() -> tuple[nn.Module, Trace]:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, layers=[2, 1, 1, 1], channels=[8, 8, 16, 16]).eval()
    randomise_batchnorm(model, torch.Generator().manual_seed(1), random_images(4, 32))
    return model, fold(model, random_images(2, 32))


def test_residual_blocks_are_units_and_the_rest_are_layers() -> None:
    model, found = resnet()
    units = {unit.module: unit.layers for unit in partition(model, found.order, found.flow)}
    assert list(units) == ["conv1", "layer1.0", "layer1.1", "layer2", "layer3", "layer4", "fc"]
    assert units["layer1.0"] == ("layer1.0.conv1", "layer1.0.conv2", "layer1.0.downsample.0")


def test_stages_and_layers_are_the_other_granularities() -> None:
    model, found = resnet()
    stages = [unit.module for unit in partition(model, found.order, found.flow, "stage")]
    assert stages == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [unit.module for unit in partition(model, found.order, found.flow, "layer")] == found.order


def test_a_regular_expression_makes_units() -> None:
    model, found = resnet()
    units = [unit.module for unit in partition(model, found.order, found.flow, "layer", r"layer1|layer2\.0")]
    assert units[:3] == ["conv1", "layer1", "layer2.0"]
    assert "layer3.0.conv1" in units
    for wrong, message in (("nothing", "matches"), ("(", "regular expression")):
        with pytest.raises(UsageError, match=message):
            partition(model, found.order, found.flow, "block", wrong)


class Two(nn.Module):
    """A module of two inputs, one that returns two tensors, one that reads past its input, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.join, self.fork, self.peek = Join(), Fork(), Peek()
        self.again = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fork(x)
        self.peek.other = a
        y = self.again(self.again(self.peek(self.join(a, b))))
        self.peek.other = None
        return self.plain(y).mean((2, 3))


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.one(a) + self.two(b)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(x)


class Peek(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.other is not None
        return self.two(self.one(x) + self.other)


def test_what_cannot_be_cut_out_falls_to_layers() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    found = fold(model, random_images(2, 8))
    units = {unit.module: len(unit.layers) for unit in partition(model, found.order, found.flow)}
    assert units == {
        "fork.one": 1, "fork.two": 1, "join.one": 1, "join.two": 1, "peek.one": 1, "peek.two": 1, "again.0": 1,
        "plain": 2,
    }  # fmt: skip
    with pytest.raises(UsageError, match="cannot be a unit"):
        partition(model, found.order, found.flow, "block", "join")


def test_a_network_without_groups_is_cut_up_all_the_same() -> None:
    model = small_network()
    found = fold(model, random_images(2))
    units_stand_alone(model, found, partition(model, found.order, found.flow), random_images(2))


def test_the_dry_run_prints_the_partition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", "demo", "--method", "brecq", "--dry-run", "--json", "--output", str(tmp_path)]
    assert command([*arguments, "-a", "4"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert any(layer["unit"] != layer["name"] for layer in layers)
    assert {layer["act_bits"] for layer in layers} == {4, 8}
    assert command([*arguments, "-o", "reconstruction_unit=layer"]) == 0
    assert all(layer["unit"] == layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"])
