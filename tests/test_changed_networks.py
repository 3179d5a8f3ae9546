"""Networks with computed or shared weights, layers that run twice, and networks changed after timm made them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import coraq
from coraq import registry
from coraq.config import RunConfig, Scheme
from coraq.errors import CoraqError
from coraq.network.load import check_finite, copy_of, load_model


def small(*middle: nn.Module) -> nn.Module:
    tail = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *middle, *tail).eval()


class Dynamic(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * (1 + x.mean()), self.bias)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.stem(x).relu()).relu()
        return self.head(self.again(10 * x).relu().mean((2, 3)))


def test_a_convolution_whose_weight_depends_on_the_image_stays_float_and_is_named() -> None:
    torch.manual_seed(0)
    network, images = small(Dynamic(16, 16, 3)), torch.randn(8, 3, 16, 16)
    module, result = coraq.quantize(network, "rtn", 8, images)
    assert [layer.name for layer in result.layers] == ["0", "6"]
    assert any("stay float" in note and "2" in note for note in result.notes)
    bright = 3 * images
    with torch.no_grad():
        assert float((module(bright) - network(bright)).norm() / network(bright).norm()) < 0.01


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_linear_layer_with_a_computed_weight_is_really_quantized(norm: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(small(), nn.ReLU(), norm(nn.Linear(10, 10))).eval()
    scheme = Scheme(bits=2, last_bits=2, column_scale="none")
    module, _ = coraq.quantize(network, "rtn", data=torch.randn(8, 3, 16, 16), scheme=scheme)
    assert max(len(row.unique()) for row in module[2].weight) <= 4


def test_layers_that_share_a_parameter_keep_their_own_codes() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    second.weight = first.weight
    network = small(first, nn.ReLU(), second)
    module, result = coraq.quantize(network, "comq", 3, torch.randn(16, 3, 16, 16))
    for layer, name in zip(result.layers[1:3], ("2", "4"), strict=True):
        error = first.weight - module.get_submodule(name).weight
        assert layer.weight_sqnr_db == pytest.approx(20 * math.log10(first.weight.norm() / error.norm()), abs=0.01)


def test_the_grid_of_a_layer_that_runs_twice_covers_both_of_its_inputs() -> None:
    torch.manual_seed(0)
    network, images = Twice().eval(), torch.randn(16, 3, 16, 16)
    module, _ = coraq.quantize(network, "rtn", data=images, scheme=Scheme(bits=8, act_bits=8))
    with torch.no_grad():
        wanted, found = network(images), module(images)
    wanted, found = wanted - wanted.mean(0), found - found.mean(0)
    assert 20 * math.log10(wanted.norm() / (wanted - found).norm()) > 20


def test_a_network_changed_after_timm_made_it_is_not_written_as_another(tmp_path: Path) -> None:
    network = timm.create_model("resnet10t", num_classes=10).eval()
    network.maxpool = nn.Identity()
    path = tmp_path / "changed.safetensors"
    with pytest.raises(CoraqError, match="maxpool"):
        coraq.quantize(network, "rtn", 8, torch.randn(4, 3, 48, 48), path=path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "state_dict.", "module._orig_mod."])
def test_a_checkpoint_with_the_prefix_of_another_tool_is_taken(prefix: str, tmp_path: Path) -> None:
    state = timm.create_model("resnet10t", num_classes=10).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({prefix + key: value for key, value in state.items()}, path)
    module = load_model(RunConfig(model="resnet10t", num_classes=10, checkpoint=str(path))).module
    assert torch.equal(module.state_dict()["fc.weight"], state["fc.weight"])


def test_integers_are_not_taken_for_float_weights(tmp_path: Path) -> None:
    state = timm.create_model("resnet10t", num_classes=10).state_dict()
    state["fc.weight"] = state["fc.weight"].to(torch.int8)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CoraqError, match=r"fc\.weight is torch\.int8"):
        load_model(RunConfig(model="resnet10t", num_classes=10, checkpoint=str(tmp_path / "w.safetensors")))


def test_a_negative_variance_is_an_error_and_a_mask_of_minus_infinity_is_none() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    network.register_buffer("mask", torch.full((2, 2), -math.inf))
    check_finite(network, "the weights")
    network[0].running_var[1] = -1
    with pytest.raises(CoraqError, match=r"0\.running_var holds 1 negative"):
        check_finite(network, "the weights")


PLUGIN = """
from coraq.methods.rtn import RoundToNearest
class Mine(RoundToNearest):
    name = "mine"
METHODS = [Mine]
"""


def test_the_content_of_a_plugin_and_of_what_it_imports_beside_it_is_in_its_identity(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.path.insert(0, __file__[:-8])\nimport beside33" + PLUGIN)
    (tmp_path / "beside33.py").write_text("X = 1\n")
    method = registry.load("mine", [tmp_path])
    before = registry.plugin_content(method)
    (tmp_path / "beside33.py").write_text("X = 2\n")
    between = registry.plugin_content(method)
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text() + "# edited\n")
    assert len({before, between, registry.plugin_content(method)}) == 3
    assert registry.plugin_content(registry.load("rtn")) is None


def test_a_compiled_network_is_taken_as_the_network_inside() -> None:
    network = small()
    assert list(copy_of(torch.compile(network)).module.state_dict()) == list(network.state_dict())
