"""The table of exports: networks × (W4A32, W4A8, W8A8), each written by `coraq export` and verified in its runtime.

    python examples/export_table.py [--assets ../shared/assets] [--networks a,b] [--schemes W4A32,W4A8] [--openvino]
    python examples/export_table.py --families       # one small network of every family, W4A32 and W4A8

The demo and the networks of the assets are quantized on their own images and measured on all evaluation images; the
others have random weights and random BatchNorm statistics, and say nothing about accuracy. Times are medians over
ONNX Runtime's float time in the same process: run it on a quiet machine. Results go to examples/results/export.md
(families: export_families.md) and, whole, to examples/results/export/*.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import families
import timm
import torch
from accuracy import NETWORKS
from families import FAMILIES, Family

import coraq
from coraq.artifact import load_checkpoint
from coraq.config import Scheme
from coraq.data import tensor_images
from coraq.export.export_result import ExportResult
from coraq.export.run import Request, export_checkpoint
from coraq.testing import random_images, randomise_batchnorm

RESULTS = Path(__file__).parent / "results"
RANDOM = ["resnet50", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny", "regnety_032", "densenet121"]
SCHEMES = {"W4A32": (4, None), "W4A8": (4, 8), "W8A8": (8, 8)}
COLUMNS = ["network", "scheme", "label", "MB", "float MB", "× packed", "graph kB", "codes", "logits error"]
COLUMNS += ["agreement %", "top-1 %", "checkpoint %", "integer convolutions", "batch 1 ×", "batch 16 ×", "verdict"]
DEMO = "demo"  # ships with coraq


@dataclass(frozen=True)
class Settings:
    """How networks with trained weights are quantized, and where they lie."""

    assets: Path
    method: str
    calib_size: int


def scheme_of(name: str) -> Scheme:
    """Symmetric weights, which every integer runtime takes; grids where integer kernels need them."""
    bits, act_bits = SCHEMES[name]
    values: dict[str, Any] = {"bits": bits, "symmetric": True}
    if act_bits is not None:
        if "act_bits" not in Scheme.model_fields:
            raise SystemExit(f"{name}: this coraq has no activation grids")
        values |= {"act_bits": act_bits, "act_placement": "integer"}
    return Scheme.model_validate(values)


def export_asset(settings: Settings, network: str, name: str, request: Request, folder: Path) -> ExportResult:
    """Quantize and export through the command line's own functions, on all evaluation images."""
    from coraq import pipeline
    from coraq.config import DataConfig, RunConfig
    from coraq.export.run import export_run

    assets = settings.assets
    options = [part.format(assets=assets) for part in NETWORKS.get(network, [])]
    pairs = {
        key.removeprefix("--").replace("-", "_"): value for key, value in zip(options[::2], options[1::2], strict=True)
    }
    config = RunConfig(
        model=DEMO if network == DEMO else f"local-dir:{assets}/models/{network}",
        method=settings.method,
        scheme=scheme_of(name),
        data=DataConfig.model_validate({**pairs, "calib_size": settings.calib_size}),
    )
    result = pipeline.run(config, runs_dir=folder)
    return export_run(Path(result.run_dir), request)


def evaluate_at(network: Any, size: int) -> None:
    """Let the checkpoint say this size, and not timm's own for evaluation (resnet50: 288): a file takes one alone."""
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, size, size)}
    network.pretrained_cfg.pop("test_input_size", None)


def export_random(architecture: str, name: str, request: Request, folder: Path) -> ExportResult:
    """A timm network with random weights: bytes, parity and speed."""
    torch.manual_seed(0)
    network: Any = timm.create_model(architecture).eval()
    size = network.pretrained_cfg["input_size"][-1]
    evaluate_at(network, size)
    images = random_images(16, size, seed=2)
    randomise_batchnorm(network, torch.Generator().manual_seed(1), images)
    path = folder / f"{architecture}.safetensors"
    coraq.quantize(network, "rtn", data=images[:4], scheme=scheme_of(name), path=path)
    seen = tensor_images(images)
    return export_checkpoint(load_checkpoint(path), request, seen, calibration=seen)


def export_family(family: Family, name: str, request: Request, folder: Path) -> ExportResult:
    """The family's small network on affine grids, the command's default, exported and verified."""
    path = folder / f"{family.architecture}.safetensors"
    images = families.images(family)
    network: Any = families.build(family)
    evaluate_at(network, family.size)
    scheme = scheme_of(name).model_copy(update={"symmetric": False})
    coraq.quantize(network, "rtn", data=list(images[:2].split(1)), scheme=scheme, path=path)
    seen = tensor_images(images)
    return export_checkpoint(load_checkpoint(path), request, seen, calibration=seen)


def row(network: str, scheme: str, result: ExportResult) -> str:
    check = result.checks[0]
    times = [f"{timed.ratio:.2f}" for timed in check.latency]
    integer = (
        "–" if check.quantized_convolutions is None else f"{check.integer_convolutions}/{check.quantized_convolutions}"
    )
    top1 = ["–" if value is None else f"{value:.2f}" for value in (check.top1_pct, check.checkpoint_top1_pct)]
    cells = [network, scheme, result.label, f"{result.size_bytes / 1e6:.2f}", f"{result.float_bytes / 1e6:.1f}"]
    cells += [f"{result.size_bytes / result.nominal_bytes:.3f}", f"{(result.graph_bytes or 0) / 1e3:.0f}"]
    cells.append("exact" if check.codes_exact else "DIFFERENT")
    cells += [
        "–" if check.logits_error is None else f"{check.logits_error:.1e}",
        f"{check.agreement_pct:.1f}",
        *top1,
        integer,
        *times,
    ]
    cells.append("verified" if result.verified else "; ".join(check.failures))
    return f"| {' | '.join(cells)} |"


def attempt(network: str, scheme: str, work: Any) -> tuple[str, ExportResult | None]:
    """A row and its result; a failure's reason stands in the row."""
    try:
        result = work()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return f"| {network} | {scheme} |" + " |" * (len(COLUMNS) - 3) + f" {reason} |", None
    return row(network, scheme, result), result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default=",".join([DEMO, *NETWORKS, *RANDOM]))
    parser.add_argument(
        "--schemes", default=None, help=f"of {','.join(SCHEMES)} (default: all; families: the first two)"
    )
    parser.add_argument("--method", default="comq", help="of networks with trained weights")
    parser.add_argument("--calib-size", type=int, default=512)
    parser.add_argument("--eval-size", type=int, default=1_000_000, help="verify on at most so many images")
    parser.add_argument("--threads", type=int, default=None, help="of the runtime (default: torch's)")
    parser.add_argument("--openvino", action="store_true", help="in OpenVINO, too (in the JSON files)")
    parser.add_argument("--families", nargs="*", default=None, help="these families (none named: all) instead")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table and the JSON files")
    arguments = parser.parse_args()
    settings = Settings(arguments.assets, arguments.method, arguments.calib_size)
    request = Request(images=arguments.eval_size, threads=arguments.threads, openvino=arguments.openvino)
    jobs: list[tuple[str, str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.families is not None:
            chosen = [f for f in FAMILIES if not arguments.families or {f.name, f.architecture} & {*arguments.families}]
            for family in chosen:
                for scheme in (arguments.schemes or "W4A32,W4A8").split(","):
                    job = partial(export_family, family, scheme, request, folder)
                    jobs.append((family.architecture, scheme, job))
        else:
            import_zoo(arguments.assets)
            for network in arguments.networks.split(","):
                for scheme in (arguments.schemes or ",".join(SCHEMES)).split(","):
                    trained = network == DEMO or network in NETWORKS
                    work = partial(export_asset, settings) if trained else export_random
                    jobs.append((network, scheme, partial(work, network, scheme, request, folder)))
        rows, failed = [], 0
        for network, scheme, work in jobs:
            line, result = attempt(network, scheme, work)
            print(line, flush=True)
            rows.append(line)
            failed += result is None or not result.verified
            if result is not None and arguments.families is None:
                (arguments.results / "export").mkdir(parents=True, exist_ok=True)
                text = json.dumps(json.loads(result.model_dump_json()), indent=1)
                (arguments.results / "export" / f"{network}-{scheme}.json").write_text(text + "\n")
            if not arguments.families:  # a choice of families is for a look
                write(arguments.results, rows, "export" if arguments.families is None else "export_families", failed)
    return 1 if failed else 0


def import_zoo(assets: Path) -> None:
    """The assets' own file registers an architecture that timm has not."""
    if (assets / "zoo.py").is_file():
        sys.path.insert(0, str(assets))
        import zoo  # noqa: F401


def write(folder: Path, rows: list[str], name: str, failed: int) -> None:
    command = "python examples/export_table.py" + (" --families" if name == "export_families" else "")
    text = [
        "# Exported files, verified",
        "",
        f"Written by `{command}` (coraq {coraq.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads).",
        "`× packed` is the size of the file over that of the packed codes, scales, zero points and float tensors.",
        "`graph kB` is the part of the file that holds operators, names, shapes and metadata. `batch n ×` is the",
        "time over that of the float export in the same process. Rows without top-1 are of networks with random",
        "weights.",
        "",
        f"{len(rows) - failed} of {len(rows)} verified.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *rows,
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
