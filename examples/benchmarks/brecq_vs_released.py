"""Seconds of one step of coraq's brecq against the authors' released code, on the same block, batch and threads.

    git clone https://github.com/yhhhli/BRECQ /tmp/BRECQ        # not part of coraq
    python examples/benchmarks/brecq_vs_released.py /tmp/BRECQ [--channels 64] [--side 56] [--act-bits 4] [--threads 1]

The block is ResNet's basic block with BatchNorm folded and random weights, the data random. One step is what both do
in their loops: draw a batch from the cache, run the block with soft weights (and learned activation steps, if asked),
loss and regulariser, backward, Adam. The authors' classes run on the CPU; their loop, which insists on CUDA, is written
out here step by step. Each runs in a process of its own, coraq's with its command's memory settings
(`coraq.runtime.memory`), and with `--same-memory` the authors', too. The medians of `--steps` steps are compared, the
two taking turns; `cpu ms` are processor time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from coraq.activations.fake_quant import make_fake_quant
from coraq.activations.points import QuantizationPoint
from coraq.api import BlockData, LayerView
from coraq.config import Scheme
from coraq.core.ranges import RangeSample
from coraq.methods.brecq import BRECQ, Unit
from coraq.network.blocks import Block
from coraq.registry import configure
from coraq.runtime.memory import reuse_freed_memory

ROWS = 128
WARM_UP = 2  # steps of each that do not count


def float_block(channels: int) -> nn.Module:
    """A folded basic block: two 3×3 convolutions with biases, a shortcut, two activations."""
    torch.manual_seed(0)
    block: Any = BasicBlock(channels, channels)
    for name in ("1", "2"):
        setattr(block, f"conv{name}", nn.Conv2d(channels, channels, 3, padding=1))
        setattr(block, f"bn{name}", nn.Identity())
    return block.eval().requires_grad_(False)


def ours(
    block: nn.Module, x: Tensor, y: Tensor, bits: int, act_bits: int | None, batch: int, precision: str
) -> Callable[[], object]:
    """One step of coraq's brecq."""
    import copy

    module = copy.deepcopy(block).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    names = ("conv1", "conv2")
    unit = Block("block", tuple(f"block.{name}" for name in names))
    x, y = (value.contiguous(memory_format=torch.channels_last) for value in (x, y))
    data = BlockData(unit, module, x, x, y)
    if act_bits is not None:
        for name in names:
            make_fake_quant(module.get_submodule(name))
            sample = RangeSample(1)
            sample.add(x[:16])
            data.points.append(QuantizationPoint(f"block.{name}.input", (f"block.{name}",), None, act_bits))
            data.grids[f"block.{name}.input"] = sample.grid(act_bits)
    views = []
    for name in names:
        layer: Any = module.get_submodule(name)
        weight = layer.weight.detach().reshape(1, layer.out_channels, -1).clone()
        views.append(LayerView(f"block.{name}", weight, layer.bias, bits, None, "conv", (3, 3), 0))
    task: Any = SimpleNamespace(
        scheme=Scheme.of(bits=bits, bias_correction="off"), rng=torch.Generator().manual_seed(0)
    )
    options = {"batch": batch, "start": "nearest", "precision": precision, "learn": "all", "holdout": 0, "positions": 0}
    config: Any = configure(BRECQ, options)
    reconstruction = Unit(config, task, data, views)
    reconstruction.start()
    groups = [{"params": [layer.rounding.alpha for layer in reconstruction.layers.values()], "lr": 1e-3}]
    if act_bits is not None:
        groups.append({"params": [step.log_factor for step in reconstruction.steps.values()], "lr": 1e-3})
        reconstruction.use_learned_grids()
    adam = torch.optim.Adam(groups)
    return lambda: reconstruction.step(adam, True, 10.0, None)


def theirs(
    folder: Path, block: Any, x: Tensor, y: Tensor, bits: int, act_bits: int | None, batch: int
) -> Callable[[], object]:
    """One step of the released block reconstruction, from the authors' own classes."""
    sys.path.insert(0, str(folder))
    from quant.adaptive_rounding import AdaRoundQuantizer
    from quant.block_recon import LossFunction
    from quant.quant_block import QuantBasicBlock
    from quant.quant_layer import QuantModule

    block.relu1, block.relu2, block.stride, block.downsample = nn.ReLU(), nn.ReLU(), 1, None
    weights = {"n_bits": bits, "channel_wise": True, "scale_method": "max"}
    unit = QuantBasicBlock(block, weights, {"n_bits": act_bits or 8, "scale_method": "max", "leaf_param": True})
    unit.set_quant_state(True, act_bits is not None)
    unit(x[:batch])  # sets the scales
    for module in unit.modules():
        if isinstance(module, QuantModule):
            module.weight_quantizer = AdaRoundQuantizer(
                uaq=module.weight_quantizer, round_mode="learned_hard_sigmoid", weight_tensor=module.org_weight.data
            )
            module.weight_quantizer.soft_targets = True
    layers = [module for module in unit.modules() if isinstance(module, QuantModule)]
    adam = torch.optim.Adam([layer.weight_quantizer.alpha for layer in layers])
    second = None
    if act_bits is not None:
        steps = [
            m.act_quantizer.delta
            for m in (*layers, unit)
            if isinstance(getattr(m.act_quantizer, "delta", None), nn.Parameter)
        ]
        second = torch.optim.Adam(steps, lr=4e-5)
    loss_of = LossFunction(unit, weight=0.01, max_count=20000, b_range=(20, 2), warmup=0.0)

    def step() -> None:
        index = torch.randperm(x.size(0))[:batch]
        wanted = y[index]
        adam.zero_grad()
        if second is not None:
            second.zero_grad()
        loss = loss_of(unit(x[index]), wanted, None)
        loss.backward(retain_graph=True)
        adam.step()
        if second is not None:
            second.step()

    return step


def side(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """One of the two in a process of its own: a step for every true message, answered with seconds and cpu seconds."""
    if name == "coraq" or arguments.same_memory:
        reuse_freed_memory()  # as the command does
    torch.set_num_threads(arguments.threads)
    block = float_block(arguments.channels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, arguments.channels, arguments.side, arguments.side, generator=generator).relu()
    with torch.no_grad():
        y = block(x.clone())
    common = (block, x, y, arguments.bits, arguments.act_bits, arguments.batch)
    step = ours(*common, arguments.precision) if name == "coraq" else theirs(arguments.repository, *common)
    while pipe.recv():
        start, used = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.perf_counter() - start, time.process_time() - used))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="checkout of github.com/yhhhli/BRECQ")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--side", type=int, default=56)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=None)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", default="float32", help="of coraq's products: float32 or bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--same-memory", action="store_true")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    wall: dict[str, list[float]] = {name: [] for name in ("coraq", "released")}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    pipes = {}
    for name in wall:
        pipes[name], other = context.Pipe()
        context.Process(target=side, args=(name, arguments, other), daemon=True).start()
    for turn in range(arguments.steps + WARM_UP):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if turn >= WARM_UP:
                wall[name].append(taken[0])
                cpu[name].append(taken[1])
    for pipe in pipes.values():
        pipe.send(False)
    medians = {f"{name} ms": round(1e3 * statistics.median(values), 2) for name, values in wall.items()}
    medians |= {f"{name} cpu ms": round(1e3 * statistics.median(values), 2) for name, values in cpu.items()}
    ratio = medians["coraq cpu ms"] / medians["released cpu ms"]
    print(
        json.dumps(
            {**medians, "ratio of cpu": round(ratio, 3), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
