"""What a Gram costs, next to the convolution whose inputs it is of and next to making it by im2col.

    python examples/benchmarks/gram.py resnet18 resnet50 mobilenetv2_100

Times are processor seconds of one thread, the least of some repetitions, so that other jobs on the machine hardly
matter. Inputs are channels-last micro-batches of random post-ReLU values; the network's weights do not matter.
A Gram's time is that of four micro-batches, divided by four; `result` is spent once, however many images.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coraq.core.gram import GramAccumulator
from coraq.core.patches import Geometry, MeanAccumulator, patches

CALLS = 4


@dataclass(frozen=True)
class Case:
    """A convolution of a network, with the size of its input."""

    geometry: Geometry
    out_channels: int
    height: int
    width: int


def cases(name: str, image: int) -> Counter[Case]:
    """The convolutions of a timm network at an image size, and how often each occurs."""
    found: Counter[Case] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        vertical, horizontal = (int(p) for p in module.padding)
        geometry = Geometry(
            kernel=(module.kernel_size[0], module.kernel_size[1]),
            stride=(module.stride[0], module.stride[1]),
            padding=(vertical, vertical, horizontal, horizontal),
            dilation=(module.dilation[0], module.dilation[1]),
            groups=module.groups,
            in_channels=module.in_channels,
        )
        found[Case(geometry, module.out_channels, inputs[0].shape[2], inputs[0].shape[3])] += 1

    model = timm.create_model(name, pretrained=False).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, 3, image, image))
    return found


def least(work: Callable[[], object], repeat: int) -> float:
    """Processor milliseconds of the quickest of `repeat` runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def measure(case: Case, batch: int, repeat: int, im2col: bool) -> dict[str, float]:
    """Milliseconds per micro-batch of the convolution, the mean, the Gram and im2col; and of `result`."""
    geometry = case.geometry
    x = (0.6 * torch.randn(batch, geometry.in_channels, case.height, case.width) + 1).relu_()
    x = x.to(memory_format=torch.channels_last)
    shape = (case.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    weight = torch.randn(shape).to(memory_format=torch.channels_last)
    padding = (geometry.padding[0], geometry.padding[2])

    def convolve() -> Tensor:
        return F.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)

    def accumulate() -> GramAccumulator:
        accumulator = GramAccumulator(geometry)
        for _ in range(CALLS):
            accumulator.add(x)
        return accumulator

    def by_im2col() -> None:
        for image in x.split(4):
            rows = patches(image, geometry)
            rows.transpose(1, 2) @ rows

    finish = least(lambda: accumulator.result(), 1) if (accumulator := accumulate()) else 0.0
    return {
        "conv": least(convolve, 2 * repeat),
        "mean": least(lambda: MeanAccumulator(geometry).add(x), repeat),
        "gram": least(accumulate, repeat) / CALLS,
        "result": finish,
        "im2col": least(by_im2col, 1) if im2col else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet18", "resnet50", "mobilenetv2_100"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--im2col", action="store_true", help="time im2col and one product too (slow)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        total: Counter[str] = Counter()
        print(f"\n{name}: ms per micro-batch of {args.batch}; ratios to the convolution")
        heads = " ".join(f"{head:>8}" for head in ("conv", "mean", "gram", "ratio", "result", "im2col"))
        print(f"{'convolution':38} {'times':>5} {heads}")
        for case, times in cases(name, args.image).items():
            took = measure(case, args.batch, args.repeat, args.im2col)
            total.update({key: times * value for key, value in took.items()})
            g = case.geometry
            label = f"{g.in_channels}→{case.out_channels} k{g.kernel[0]} s{g.stride[0]} g{g.groups} at {case.height}"
            print(line(label, times, took), flush=True)
        print(line("total", sum(cases(name, args.image).values()), total))


def line(label: str, times: int, took: dict[str, float] | Counter[str]) -> str:
    numbers = (took["conv"], took["mean"], took["gram"], took["gram"] / took["conv"], took["result"], took["im2col"])
    return f"{label:38} {times:5} " + " ".join(f"{number:8.2f}" for number in numbers)


if __name__ == "__main__":
    main()
