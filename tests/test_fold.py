"""Folding never changes what a network computes, and finds out when it would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

from coraq.errors import CoraqError
from coraq.network import fold as folding
from coraq.network.fold import fold, relative_error, restructure, trace
from coraq.testing import hook_count, random_images, randomise_batchnorm, small_network, state_digest

# A fold is computed in float64 and rounded once to float32 (6e-8 a weight); a sum of n ≤ 1000 products in float32
# adds at most about √n · 6e-8. A missing activation or shift is an error of order one.
ROUNDING = 2e-6


def prepared(network: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    network.eval()
    randomise_batchnorm(network, generator, images)
    return network


@torch.no_grad()
def folded(network: nn.Module, images: Tensor, tolerance: float = ROUNDING) -> folding.Trace:
    """Fold in place; the output must stay what it was."""
    prepared(network, images)
    before = network(images)
    assert before.std() > 1e-3  # a dead output would agree with anything
    found = fold(network, images)
    assert relative_error(network(images), before) < tolerance
    assert hook_count(network) == 0
    return found


@pytest.fixture
def images() -> Tensor:
    return random_images(2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_behind_a_convolution_goes_into_it(images: Tensor, bias: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU())
    assert folded(network, images).structure.folded == {"1": "0"}
    assert isinstance(network[1], nn.Identity)
    assert network[0].bias is not None


def test_a_norm_behind_a_grouped_or_depthwise_convolution_goes_into_it(images: Tensor) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, groups=4), nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16),
    )  # fmt: skip
    assert folded(network, images).structure.folded == {"1": "0", "3": "2", "5": "4"}


def test_a_norm_behind_a_linear_layer_goes_into_it() -> None:
    network = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.GELU())
    assert folded(network, torch.randn(16, 12, generator=torch.Generator().manual_seed(0))).structure.folded == {
        "1": "0"
    }


def test_a_norm_that_carries_an_activation_leaves_it_behind(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU))
    assert folded(network, images).structure.folded == {"1": "0"}
    assert isinstance(network[1], nn.SiLU)


def test_a_norm_without_scale_and_shift_goes_into_its_convolution(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False))
    assert folded(network, images).structure.folded == {"1": "0"}


def test_an_in_place_activation_behind_a_norm_is_kept(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    assert folded(network, images).structure.folded == {"1": "0"}


def test_tf_same_padding_stays_where_size_and_stride_need_it() -> None:
    network = nn.Sequential(Conv2dSame(3, 8, 3, stride=2), nn.BatchNorm2d(8), Conv2dSame(8, 8, 5, stride=2, groups=8))
    found = folded(network, random_images(2, size=15))
    assert found.structure.folded == {"1": "0"}
    assert found.structure.materialised == {}  # padding alone computes no weight
    assert found.outputs == {"0": 64, "2": 16}


@pytest.mark.parametrize(
    ("kind", "same"),
    [(StdConv2d, False), (StdConv2dSame, True), (ScaledStdConv2d, False), (ScaledStdConv2dSame, True)],
)
def test_a_standardised_weight_is_materialised(kind: Any, same: bool, images: Tensor) -> None:
    network = nn.Sequential(kind(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        network[0].weight.add_(0.7)  # a mean that standardising takes out
    found = folded(network, images)
    assert found.structure.materialised == {"0": same}
    assert type(network[0]) is (Conv2dSame if same else nn.Conv2d)


def test_a_materialised_weight_keeps_the_memory_format(images: Tensor) -> None:
    # otherwise the reloaded network sums in another order than the one that was calibrated
    network = nn.Sequential(StdConv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)
    folded(network, images.contiguous(memory_format=torch.channels_last))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.conv(torch.relu(self.norm(x)))


def test_a_pre_activation_norm_stays_because_the_residual_reads_what_it_reads(images: Tensor) -> None:
    network = PreActivation()
    assert folded(network, images).structure.folded == {}
    assert isinstance(network.norm, nn.BatchNorm2d)


class Peeking(nn.Module):
    """The convolution's output is read beside the norm: by a method of the tensor, an operator, a norm, or late."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        if self.how == "in place before":
            raw.mul_(0.5)
        y = torch.relu(self.norm(raw))
        if self.how == "method":
            return y * raw.mean((2, 3), keepdim=True)
        if self.how == "operator":
            return y + raw
        if self.how == "second norm":
            return y + self.other(raw)
        if self.how == "view":
            return y + raw.flatten(1).sum(1)[:, None, None, None]
        if self.how == "indexing":
            return y + raw[:, :1]
        if self.how == "list":
            return torch.cat([y, raw], 1)
        return y


@pytest.mark.parametrize("how", ["in place before", "method", "operator", "second norm", "view", "indexing", "list"])
def test_a_norm_is_not_folded_when_somebody_else_reads_the_convolution(how: str, images: Tensor) -> None:
    assert folded(Peeking(how), images).structure.folded == {}


def test_a_norm_is_folded_when_only_the_shape_is_read(images: Tensor) -> None:
    class Shapes(Peeking):
        def forward(self, x: Tensor) -> Tensor:
            raw = self.conv(x)
            assert raw.shape[1] == raw.size(1) == 8
            assert raw.dtype == torch.float32
            return self.norm(raw)

    assert folded(Shapes(""), images).structure.folded == {"norm": "conv"}


def test_a_repvgg_identity_branch_stays_and_its_convolutions_fold() -> None:
    network = timm.create_model("repvgg_a0", num_classes=10)
    found = folded(network, random_images(4, size=32), tolerance=1e-4)  # 22 layers pass the rounding on
    left = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left
    assert all(name.endswith("identity") for name in left)
    assert set(found.structure.folded) == {
        name for name, module in timm.create_model("repvgg_a0").named_modules() if isinstance(module, nn.BatchNorm2d)
    } - set(left)


def test_a_convolution_that_runs_twice_keeps_its_norm(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for norm in self.norms:  # two norms, one convolution: neither can go in
                x = torch.relu(norm(self.conv(x)))
            return x

    assert folded(Twice(), images).structure.folded == {}


def test_layers_come_in_the_order_in_which_they_run(images: Tensor) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(8, 4), nn.Linear(8, 4), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).mean((2, 3)))
            return out

    found = folded(Backwards(), images)
    assert found.order == ["first", "last"]
    assert found.outputs == {"first": 14 * 14, "last": 1}


def test_tracing_leaves_the_network_as_it_was(images: Tensor) -> None:
    network = small_network()
    before = state_digest(network)
    trace(network, images)
    assert state_digest(network) == before
    assert hook_count(network) == 0


def test_dropping_the_activation_of_a_norm_is_caught_by_fold_itself(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the fault that broke 12 of 23 networks elsewhere: an identity in the place of a norm with an activation
    monkeypatch.setattr(folding, "_remainder", lambda norm: nn.Identity())
    with pytest.raises(CoraqError, match="changed the network's output"):
        fold(small_network(), images)


def test_a_wrong_shift_is_caught_by_fold_itself(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    right = folding._fold

    def wrong(layer: Any, norm: Any) -> None:
        norm.eps += 0.05
        right(layer, norm)

    monkeypatch.setattr(folding, "_fold", wrong)
    with pytest.raises(CoraqError, match="changed the network's output"):
        fold(small_network(), images)


def test_a_network_that_gives_nan_is_not_taken_for_unchanged(images: Tensor) -> None:
    network = small_network()
    with torch.no_grad():
        network.get_submodule("head").weight[0, 0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(CoraqError):
        fold(network, images)


def test_rounding_that_the_network_blows_up_is_not_taken_for_a_fault(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(1e5 * self.norm(self.conv(x)))  # rounding of 1e-7 grows to 1e-2

    network = prepared(Chaotic(), images)
    broken = copy.deepcopy(network)
    with torch.no_grad():
        before = network(images)
        assert fold(network, images).structure.folded == {"norm": "conv"}
        assert relative_error(network(images), before) > 1e-3
    monkeypatch.setattr(folding, "_fold", lambda layer, norm: None)
    with pytest.raises(CoraqError, match="changed the network's output"):
        fold(broken, images)


def test_a_structure_rebuilds_the_same_modules_without_data(images: Tensor) -> None:
    network, again = small_network(), small_network(seed=9)
    found = fold(network, images)
    restructure(again, found.structure)
    again.load_state_dict(network.state_dict())  # strict: the same parameters under the same names
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_a_structure_for_another_network_is_refused(images: Tensor) -> None:
    found = fold(small_network(), images)
    with pytest.raises(CoraqError, match="has no module"):
        restructure(nn.Sequential(nn.Conv2d(3, 8, 3)), found.structure)


@pytest.mark.assets
def test_a_trained_network_with_real_statistics_folds_exactly(assets: Any) -> None:
    network = timm.create_model(f"local-dir:{assets / 'models' / 'resnet18_cifar10'}", pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(images)
        found = fold(network, images)
        assert relative_error(network(images), before) < 1e-5
    assert len(found.structure.folded) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
