"""CoRa's search: one step over one forward and backward pass of the float network, on the same images.

    python examples/benchmarks/search.py local-dir:FOLDER [--batch 32] [--budget 0.05] [--repeats 5]

A step is all that the search does for one batch: building every layer's effective weight from its cutoff, the forward
pass, the KL to the float logits, the backward pass to the cutoffs, Adam and the projection. The float network's pass
is a training step's: forward, the same KL, gradients of all weights. Both alternate; medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional

from coraq import registry
from coraq.api import SearchLayer, directions, search_cutoffs
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core.lowrank import can_pay
from coraq.data import Preprocess
from coraq.network.fold import fold
from coraq.network.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.05, help="adapter parameters for each weight")
    parser.add_argument("--plugins-dir", action="append", default=[])
    arguments = parser.parse_args()
    registry.import_plugins(arguments.plugins_dir)
    model = load_model(RunConfig(model=arguments.model)).module.to(memory_format=torch.channels_last)
    size = Preprocess.resolve(model, DataConfig()).input_size
    images = torch.randn(arguments.batch, *size, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    task = CalibrationTask(model, fold(model, images[:2]), Scheme.of(bits=3), [images[:8]], find_method=registry.make)
    layers: dict[str, SearchLayer] = {}
    total = sum(layer.weight.numel() for layer in task.layers)
    for layer in task.layers:
        codes = task.preview(layer.name, task.codes(layer.name, "rtn"))
        if can_pay(layer.shape, layer.bits):
            weight = codes.weight.dequantize()
            found = directions(layer.weight - weight)
            groups, out, inputs = layer.shape
            price = groups * (out + inputs) * found.energy.shape[1] / total
            layers[layer.name] = SearchLayer(weight, codes.bias, task.stats(layer.name).mean.float(), found, price)
    task.close()
    with torch.no_grad():
        target = task.teacher(images)
    for parameter in task.teacher.parameters():
        parameter.requires_grad_(True)

    # as the search has them: all together at the budget
    cutoffs = [arguments.budget / sum(layer.price for layer in layers.values())] * len(layers)

    def step() -> None:
        search_cutoffs(task.student, layers, cutoffs, [(images, target)], 1, budget=arguments.budget)

    def float_step() -> None:
        logits = task.teacher(images)
        loss = functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1) - 0.1, log_target=True)
        torch.autograd.grad(loss, [p for p in task.teacher.parameters() if p.requires_grad], allow_unused=True)

    times: dict[str, list[float]] = {"search": [], "float": []}
    for repeat in range(arguments.repeats + 1):
        for name, run in (("search", step), ("float", float_step)):
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    search, plain = (statistics.median(times[name]) for name in ("search", "float"))
    print(
        f"{arguments.model}: batch {arguments.batch}, {torch.get_num_threads()} threads, {len(layers)} cutoffs of "
        f"{cutoffs[0]:.3f}"
    )
    print(f"search step {search:.2f} s, float forward and backward {plain:.2f} s: ratio {search / plain:.2f}")


if __name__ == "__main__":
    main()
