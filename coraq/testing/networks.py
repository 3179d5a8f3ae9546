"""Small random networks on which every promise can be checked in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

ARCHITECTURE = "coraq_small"
IMAGE_SIZE = 16


class SmallNetwork(nn.Module):
    """Every kind of layer that a method must handle, in as little as runs: 4,700 weights, 16-pixel images.

    Dense 3×3, grouped 3×3, depthwise 5×5 with TF "same" padding and stride, 1×1 inside a residual branch, 3×3 behind
    a norm that cannot be folded (pre-activation), and two Linear layers; plain, activation-carrying and in-place
    variants of norm and activation.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
        self.grouped_norm = BatchNormAct2d(16)
        self.depthwise = create_conv2d(16, 16, 5, stride=2, padding="same", groups=16)
        self.depthwise_norm = BatchNormAct2d(16, act_layer=nn.SiLU)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(16)
        self.preactivation = nn.BatchNorm2d(16)
        self.dense = nn.Conv2d(16, 24, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.hidden = nn.Linear(24, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        x = self.grouped_norm(self.grouped(x))
        x = self.depthwise_norm(self.depthwise(x))
        x = x + self.pointwise_norm(self.pointwise(x))
        x = self.act(self.dense(self.act(self.preactivation(x))))
        return self.head(self.act(self.hidden(x.mean((2, 3)))))


default_cfgs = generate_default_cfgs({ARCHITECTURE: {"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "num_classes": 10}})


@register_model
def coraq_small(pretrained: bool = False, **kwargs: Any) -> SmallNetwork:
    """The network of coraq's conformance test."""
    model: SmallNetwork = build_model_with_cfg(SmallNetwork, ARCHITECTURE, pretrained, **kwargs)
    return model


def small_network(seed: int = 0, awkward: bool = False) -> nn.Module:
    """A `SmallNetwork` in eval mode with random weights and BatchNorm statistics; timm can build it by name.

    Args:
        awkward: put in what trained networks have and random ones lack: output channels of zeros, input channels
            that are always zero, and channels whose weights are all equal.
    """
    import timm

    generator = torch.Generator().manual_seed(seed)
    model: nn.Module = timm.create_model(ARCHITECTURE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            parameter.normal_(0, fan_in**-0.5, generator=generator)
    randomise_batchnorm(model, generator, random_images(8, seed=seed))
    if awkward:
        make_awkward(model)
    return model


@torch.no_grad()
def make_awkward(model: nn.Module) -> None:
    """Dead, constant and single-valued channels in a `SmallNetwork`; see `small_network`."""
    modules: dict[str, Any] = dict(model.named_modules())
    for norm, channel in ((modules["stem_norm"], 3), (modules["grouped_norm"], 5)):
        norm.weight[channel] = 0.0
        norm.bias[channel] = -1.0
    # behind their activations, channel 3 and channel 5 are now zero for every image
    modules["depthwise"].weight[2] = 0.0
    modules["pointwise"].weight[0] = 0.25
    modules["dense"].weight[1] = 0.0
    modules["dense"].weight[2] = -0.125
    modules["dense"].weight[3, 1:] = 0.0
    modules["hidden"].weight[4] = 1e-12
    modules["head"].weight[0] = 0.0


def random_images(count: int, size: int = IMAGE_SIZE, seed: int = 0) -> Tensor:
    """Smooth random images [count, 3, size, size]: neighbouring pixels correlate, as in photographs."""
    generator = torch.Generator().manual_seed(seed + 17)
    coarse = torch.randn(count, 3, max(2, size // 4), max(2, size // 4), generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


@torch.no_grad()
def randomise_batchnorm(model: nn.Module, generator: torch.Generator, images: Tensor | None = None) -> None:
    """Give every norm with running statistics random statistics, scale and shift, in place.

    Fresh norms are close to the identity and hide every mistake that folding can make.

    Args:
        images: if given, the statistics are those of a forward pass over them, off by up to a factor of two, so that
            the signal reaches the output of a deep random network; without, they are random alone.
    """
    norms: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "running_var", None), Tensor)
    ]

    def fill(norm: Any, mean: Tensor, var: Tensor) -> None:
        def uniform(low: float, high: float) -> Tensor:
            return torch.empty_like(mean).uniform_(low, high, generator=generator)

        floor = 0.3 * var.mean() + 1e-4  # a channel that never moves would be blown up
        norm.running_mean.copy_(mean + uniform(-0.3, 0.3) * (var + floor).sqrt())
        norm.running_var.copy_((var + floor) * uniform(0.5, 2.0))
        if isinstance(norm.weight, Tensor):
            norm.weight.copy_(uniform(0.5, 1.5))
        if isinstance(norm.bias, Tensor):
            norm.bias.copy_(uniform(-0.3, 0.3))

    if images is None:
        for norm in norms:
            fill(norm, torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var))
        return
    seen: set[nn.Module] = set()

    def observe(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if norm in seen:
            return
        seen.add(norm)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        fill(norm, x.mean(dims), x.var(dims, unbiased=False))

    handles = [norm.register_forward_pre_hook(observe) for norm in norms]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
