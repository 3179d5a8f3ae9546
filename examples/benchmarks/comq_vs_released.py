"""coraq's comq against the authors' released COMQ routine, on the same layer and the same inputs.

    git -C COMQ_CHECKOUT show HEAD:quant.py > /tmp/quant.py     # github.com/AozhongZhang/COMQ, not part of coraq
    python examples/benchmarks/comq_vs_released.py /tmp/quant.py --bits 4

The layer is a 3×3 convolution of 128 into 256 channels on ReLU-like, correlated maps: 25,088 rows of 1,152 inputs.
Both minimise ‖XW − XQ‖² with a scale and a zero point per output channel, float inputs, no bias correction. The
released routine takes minutes at full size, in proportion to rows · sweeps: `--rows 2048` for a quick look.
Times include coraq's Gram; the released routine has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, unfold

from coraq.api import LayerView, LeastSquares
from coraq.config import Scheme
from coraq.methods.comq import COMQ

CHANNELS, OUT, SIDE = 128, 256, 28


def make_layer(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight [256, 1152] and patches [rows, 1152] of smooth, channel-correlated, rectified maps."""
    generator = torch.Generator().manual_seed(seed)
    images = -(-rows // SIDE**2)
    maps = torch.randn(images, CHANNELS, SIDE, SIDE, generator=generator)
    maps = maps + 2 * avg_pool2d(maps, 5, stride=1, padding=2)
    strength = 0.3 + torch.rand(CHANNELS, 1, generator=generator)
    mix = strength * (torch.eye(CHANNELS) + torch.randn(CHANNELS, CHANNELS, generator=generator) / CHANNELS**0.5)
    maps = torch.einsum("dc,ncyx->ndyx", mix, maps).relu()
    patches = unfold(maps, 3, padding=1).transpose(1, 2).reshape(-1, CHANNELS * 9)[:rows]
    heavy_tailed = torch.randn(OUT, CHANNELS * 9, generator=generator) * (
        0.5 + torch.rand(OUT, CHANNELS * 9, generator=generator)
    )
    return 0.03 * heavy_tailed, patches.contiguous()


def gram(x: Tensor, chunk: int = 4096) -> Tensor:
    """`E[x xᵀ]`, float64 [1, in, in]: products in float32, sums of chunks in float64."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(chunk):
        total += part.T @ part
    return total.unsqueeze(0) / len(x)


def relative_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    """‖XW − XQ‖² / ‖XW‖², by multiplying out."""
    return float((x @ (weight - quantized).T).double().square().sum() / (x @ weight.T).double().square().sum())


def run_released(path: Path, weight: Tensor, x: Tensor, bits: int, sweeps: int) -> tuple[Tensor, float]:
    """The authors' routine (cyclic order) and its seconds."""
    spec = importlib.util.spec_from_file_location("released_comq", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    start = time.perf_counter()
    quantized, _, _ = module.COMQ_Layer._quant_layer(weight.clone(), sweeps, bits, x)
    return quantized, time.perf_counter() - start


def run_coraq(weight: Tensor, x: Tensor, bits: int, **options: Any) -> tuple[Tensor, float]:
    """coraq's comq from the raw inputs, Gram included, and its seconds."""
    view = LayerView("layer", weight.unsqueeze(0), None, bits, None, "conv", (3, 3), 0)
    start = time.perf_counter()
    squares = LeastSquares(view.weight, gram(x))
    layer, _ = COMQ(COMQ.Config(**options)).solve(view, squares, Scheme(bits=bits, symmetric=False))
    return layer.dequantize()[0], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("released", type=Path, help="the authors' quant.py")
    parser.add_argument("--rows", type=int, default=25_088)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--sweeps", type=int, default=1, help="of the released routine and of the paper preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="one object on stdout, the table on stderr")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    weight, x = make_layer(args.rows, args.seed)
    table = sys.stderr if args.json else sys.stdout
    print(
        f"weight {tuple(weight.shape)}, {len(x)} rows, {torch.get_num_threads()} threads, seed {args.seed}", file=table
    )
    print(f"{'bits':>4}  {'routine':<34}{'error':>9}{'seconds':>10}{'times faster':>14}", file=table)
    results = []
    run_coraq(weight, x[:256], 4)  # warm-up: first calls into the linear algebra library
    for bits in args.bits:
        paper = {"preset": "paper", "sweeps": args.sweeps}
        ours = {
            f"coraq, paper preset, {args.sweeps} sweep, no refit": run_coraq(weight, x, bits, **paper, scales=False),
            f"coraq, paper preset, {args.sweeps} sweep": run_coraq(weight, x, bits, **paper),
            "coraq, default": run_coraq(weight, x, bits),
        }
        quantized, released_s = run_released(args.released, weight, x, bits, args.sweeps)
        for name, (result, seconds) in {**ours, f"released, {args.sweeps} sweep": (quantized, released_s)}.items():
            error, ratio = relative_error(weight, result, x), released_s / seconds
            print(f"{bits:>4}  {name:<34}{error:>9.5f}{seconds:>10.2f}{ratio:>14.0f}", file=table, flush=True)
            results.append({"bits": bits, "routine": name, "error": error, "time_s": seconds, "times_faster": ratio})
    if args.json:
        print(json.dumps({"rows": len(x), "threads": torch.get_num_threads(), "seed": args.seed, "results": results}))


if __name__ == "__main__":
    main()
