"""What a calibrated run costs over its floor: one plain float pass over the same images.

    python examples/benchmarks/engine.py MODEL --calib-dir FOLDER [--class-map FILE] [--count 256] [--methods rtn,comq]

Prints, for each method, seconds and the ratio to the plain float pass of the same images in the same memory layout
(measured before and after each method in the same process, medians), and where the time went. Writing,
evaluation and image decoding are left out of both sides.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from coraq import registry
from coraq.calibration.bfloat16_pass import resolve_precision
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.data import Preprocess, open_images
from coraq.network.fold import fold
from coraq.network.load import load_model
from coraq.runtime.memory import reuse_freed_memory
from coraq.runtime.system import peak_memory


def main() -> None:
    reuse_freed_memory()  # as the command does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib-dir")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--methods", default="rtn,comq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--memory", type=float, help="bound on live activations in GB")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--random-weights", action="store_true", help="time a network whose weights are not at hand")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    registry.import_plugins()

    data = DataConfig(calib_dir=arguments.calib_dir, calib_size=arguments.count, batch_size=arguments.batch_size)
    config = RunConfig(model=arguments.model, data=data, scheme=Scheme.of(bits=arguments.bits))
    if arguments.random_weights:
        import timm

        network = timm.create_model(arguments.model).eval()
    else:
        network = load_model(config).module
    network = network.to(memory_format=torch.channels_last).requires_grad_(False)
    preprocess = Preprocess.resolve(network, data)
    found = fold(network, torch.randn(2, *preprocess.input_size))
    images = open_images(data, preprocess, None, 0).calibration
    batches = [pixels.contiguous(memory_format=torch.channels_last) for pixels, _ in images.batches()]
    count = sum(len(batch) for batch in batches)
    print(f"{arguments.model}: {count} images in {len(batches)} micro-batches, {torch.get_num_threads()} threads")

    precision = resolve_precision(arguments.precision, config.scheme, torch.device("cpu"))
    print(f"calibration passes in {precision}, the plain float pass in float32")

    def plain() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                network(batch)
        return time.perf_counter() - start

    plain()
    for name in arguments.methods.split(","):
        method = registry.load(name)
        options = registry.configure(method, {})
        scheme = registry.settled(config.scheme, options)  # as a command has it
        floors, totals, clocks = [plain()], [], []
        for _ in range(arguments.repeat):
            bound = None if arguments.memory is None else int(arguments.memory * 1e9)
            task = CalibrationTask(
                network,
                found,
                scheme,
                batches,
                memory_bytes=bound,
                early_images=data.calib_early_images,
                half=precision == "bfloat16",
            )
            start = time.perf_counter()
            method(options).quantize(task)
            task.finish(name)
            totals.append(time.perf_counter() - start)
            clocks.append(dict(task.clock))
            floors.append(plain())
        floor, total = statistics.median(floors), statistics.median(totals)
        clock = clocks[totals.index(sorted(totals)[len(totals) // 2])]
        rest = total - sum(clock.values())
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in clock.items())
        print(
            f"{name:>6}: {total:7.2f} s = {total / floor:.2f} × the plain float pass of {floor:.2f} s "
            f"({parts}, rest {rest:.2f} s)"
        )
        print(f"        spilled micro-batches {task.spilled}, peak memory of the process {peak_memory() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
