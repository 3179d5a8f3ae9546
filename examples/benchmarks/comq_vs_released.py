"""coraq's comq against the authors' released COMQ routine, on the same layer and the same inputs.

    git -C COMQ_CHECKOUT show HEAD:quant.py > /tmp/quant.py     # github.com/AozhongZhang/COMQ, not part of coraq
    python examples/benchmarks/comq_vs_released.py /tmp/quant.py --bits 4 --threads 1 --greedy

The layer is a 3×3 convolution of 128 into 256 channels on ReLU-like, correlated maps: 25,088 rows of 1,152 inputs.
Both minimise ‖XW − XQ‖² with a scale and a zero point per output channel, float inputs, no bias correction. `--greedy`
is what the authors' documented commands use. The released routine takes minutes at full size, in proportion to rows ·
sweeps: `--rows 1568` for a quick look.

coraq starts from the maps and its time includes the Gram; the released routine gets the patches for nothing. `cpu s`
are processor seconds, which other jobs on the machine hardly change; compare them at `--threads 1`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, unfold

from coraq.api import LayerView, LeastSquares
from coraq.config import Scheme
from coraq.core.gram import GramAccumulator
from coraq.core.patches import Geometry
from coraq.methods.comq import COMQ

CHANNELS, OUT, SIDE = 128, 256, 28


def make_layer(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight [256, 1152], and smooth, channel-correlated, rectified maps [images, 128, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    images = max(1, rows // SIDE**2)
    maps = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
    maps = maps + 2 * avg_pool2d(maps, 5, stride=1, padding=2)
    strength = 0.3 + torch.rand(CHANNELS, 1, generator=generator)
    mix = strength * (torch.eye(CHANNELS) + torch.randn(CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5)
    maps = torch.einsum("dc,ncyx->ndyx", mix, maps).relu()
    heavy_tailed = torch.randn(OUT, CHANNELS * 9, generator=generator) * (
        0.5 + torch.rand(OUT, CHANNELS * 9, generator=generator)
    )
    return 0.03 * heavy_tailed, maps.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Outcome:
    """A quantized weight [out, in], and what it took."""

    weight: Tensor
    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Tensor]) -> Outcome:
    wall, cpu = time.perf_counter(), time.process_time()
    weight = work()
    return Outcome(weight, time.perf_counter() - wall, time.process_time() - cpu)


def relative_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    """‖XW − XQ‖² / ‖XW‖², by multiplying out."""
    return float((x @ (weight - quantized).T).double().square().sum() / (x @ weight.T).double().square().sum())


def load_released(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("released_comq", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is not a Python file")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.COMQ_Layer._quant_layer


def run_coraq(weight: Tensor, maps: Tensor, bits: int, **options: Any) -> Tensor:
    """coraq's comq from the layer's input maps, Gram included."""
    accumulator = GramAccumulator(Geometry((3, 3), padding=(1, 1, 1, 1), in_channels=CHANNELS))
    for batch in maps.split(32):
        accumulator.add(batch)
    view = LayerView("layer", weight.unsqueeze(0), None, bits, None, "conv", (3, 3), 0)
    squares = LeastSquares(view.weight, accumulator.result().gram)
    layer, _ = COMQ(COMQ.Config(**options)).solve(view, squares, Scheme.of(bits=bits, symmetric=False))
    return layer.dequantize()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, help="the authors' quant.py")
    parser.add_argument("--rows", type=int, default=25_088, help="whole images of 784 rows")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--sweeps", type=int, default=1, help="of the released routine and of the paper preset")
    parser.add_argument(
        "--greedy", action="store_true", help="greedy order, in the released routine and the paper preset"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="one object on stdout, the table on stderr")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    table = sys.stderr if args.json else sys.stdout
    released = load_released(args.released)
    weight, maps = make_layer(args.rows, args.seed)
    x = unfold(maps, 3, padding=1).transpose(1, 2).reshape(-1, CHANNELS * 9)
    order = "greedy" if args.greedy else "cyclic"
    print(f"weight {tuple(weight.shape)}, {len(x)} rows, {torch.get_num_threads()} threads, {order}", file=table)
    print(f"{'bits':>4}  {'routine':<24}{'error':>9}{'wall s':>9}{'cpu s':>9}{'times faster (cpu)':>20}", file=table)
    results = []
    run_coraq(weight, maps[:1], 4)  # warm-up: first calls into the linear algebra library
    for bits in args.bits:
        paper = partial(run_coraq, weight, maps, bits, preset="paper", sweeps=args.sweeps, order=order)
        theirs = partial(released, weight.clone(), args.sweeps, bits, x, args.greedy)
        outcomes = {
            "released": timed(lambda run=theirs: run()[0]),  # type: ignore[misc]
            "coraq, same steps": timed(partial(paper, scales=False)),
            "coraq, paper preset": timed(paper),
            "coraq, default": timed(partial(run_coraq, weight, maps, bits)),
        }
        for name, outcome in outcomes.items():
            error, ratio = relative_error(weight, outcome.weight, x), outcomes["released"].cpu_s / outcome.cpu_s
            line = f"{bits:>4}  {name:<24}{error:>9.5f}{outcome.wall_s:>9.2f}{outcome.cpu_s:>9.2f}{ratio:>20.1f}"
            print(line, file=table, flush=True)
            results.append(
                {"bits": bits, "routine": name, "error": error, "wall_s": outcome.wall_s, "cpu_s": outcome.cpu_s}
            )
    if args.json:
        setting = {"rows": len(x), "sweeps": args.sweeps, "order": order, "threads": torch.get_num_threads()}
        print(json.dumps({**setting, "seed": args.seed, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
