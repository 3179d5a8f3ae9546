"""One small architecture of every convolutional family in timm: fold, quantize, write, reload, compare.

    python examples/families.py                 # writes examples/results/families.md
    python examples/families.py nfnet repvgg    # prints these rows only
    python examples/families.py --published     # depths and widths as published, not cut down

Weights are random, BatchNorm statistics random around those of the images. The errors say that every layer is
reached and that nothing breaks; they say nothing about accuracy, which needs trained weights.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import coraq
from coraq.artifact import load_checkpoint
from coraq.testing import random_images, randomise_batchnorm

METHODS = ("rtn", "comq", "qera", "cora")
# every step of comq is taken, but only once: this is about networks, not about accuracy
ONCE = {"candidates": 1, "sweeps": 1}
OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "comq": ONCE,
    "qera": {"rank": 2, "base": "comq", "base_options": ONCE},
    "cora": {"budget": 0.05, "base_options": ONCE},
}
BITS = 4
RESULT = Path(__file__).parent / "results" / "families.md"


@dataclass(frozen=True)
class Family:
    """`smaller` are timm's own arguments that cut depth or width without changing the kind of any block.

    A `heavy` network has layers of thousands of inputs, or hundreds of layers: solving it takes from ten seconds up.
    """

    name: str
    architecture: str
    smaller: dict[str, Any] = field(default_factory=dict)
    size: int = 64
    heavy: bool = False


ONE_EACH = {"layers": [1, 1, 1, 1]}
NARROW = {**ONE_EACH, "channels": [32, 64, 96, 128]}
NARROW_V2 = {**ONE_EACH, "channels": [64, 128, 192, 256]}
SHALLOW = {"depths": [1, 1, 2, 1]}

FAMILIES = [
    Family("resnet", "resnet50", NARROW),
    Family("resnet-d", "resnet26t", NARROW),
    Family("resnet, anti-aliased", "resnetblur50", NARROW),
    Family("resnetv2", "resnetv2_50", NARROW_V2),
    Family("resnetv2, BiT", "resnetv2_50x1_bit", size=32, heavy=True),
    Family("resnest", "resnest14d", heavy=True),
    Family("res2net", "res2net50_26w_4s", NARROW),
    Family("resnext", "resnext50_32x4d", NARROW),
    Family("seresnet", "seresnet50", NARROW),
    Family("ecaresnet", "ecaresnet26t", NARROW),
    Family("sknet", "skresnet18", NARROW),
    Family("senet", "legacy_seresnext26_32x4d", ONE_EACH, heavy=True),
    Family(
        "senet154",
        "legacy_senet154",
        {**ONE_EACH, "downsample_kernel_size": 1, "downsample_padding": 0},
        size=32,
        heavy=True,
    ),
    Family("gcresnet", "gcresnext26ts", heavy=True),
    Family("regnetx", "regnetx_002"),
    Family("regnety", "regnety_002"),
    Family("regnetz", "regnetz_005", heavy=True),
    Family("regnetv (pre-activation)", "regnetv_040", size=32, heavy=True),
    Family("efficientnet", "efficientnet_b0"),
    Family("efficientnetv2", "efficientnetv2_rw_t", size=64, heavy=True),
    Family("efficientnet_lite", "efficientnet_lite0"),
    Family("tf_efficientnet", "tf_efficientnet_b0"),
    Family("mobilenetv1", "mobilenetv1_100"),
    Family("mobilenetv2", "mobilenetv2_035"),
    Family("mobilenetv3", "mobilenetv3_small_050"),
    Family("mobilenetv4", "mobilenetv4_conv_small_035"),
    Family("mixnet", "mixnet_s"),
    Family("tf_mixnet", "tf_mixnet_s", heavy=True),
    Family("mnasnet", "mnasnet_small"),
    Family("semnasnet", "semnasnet_050"),
    Family("spnasnet", "spnasnet_100"),
    Family("tinynet", "tinynet_e"),
    Family("fbnet", "fbnetc_100"),
    Family("fbnetv3", "fbnetv3_b", heavy=True),
    Family("hardcorenas", "hardcorenas_a"),
    Family("lcnet", "lcnet_035"),
    Family("lcnetv2", "lcnetv2_small"),
    Family("ghostnet", "ghostnet_050"),
    Family("ghostnetv2", "ghostnetv2_100"),
    Family("ghostnetv3", "ghostnetv3_050", heavy=True),
    Family("repghost", "repghostnet_050"),
    Family("convnext", "convnext_atto", SHALLOW),
    Family("convnextv2", "convnextv2_atto", SHALLOW),
    Family("convmixer", "convmixer_768_32", size=32, heavy=True),
    Family("inception_next", "inception_next_atto", SHALLOW),
    Family("inception_v3", "inception_v3", size=80, heavy=True),
    Family("inception_v4", "inception_v4", size=112, heavy=True),
    Family("inception_resnet_v2", "inception_resnet_v2", size=80, heavy=True),
    Family("densenet", "densenet121", {"block_config": [2, 2, 2, 2]}),
    Family("dla", "dla46_c"),
    Family("dla, res2net blocks", "dla60_res2net", {"channels": [16, 32, 32, 64, 64, 128]}),
    Family("dpn", "dpn68", {"k_sec": [1, 1, 2, 1]}),
    Family("vgg", "vgg11_bn", size=32, heavy=True),
    Family("xception", "legacy_xception", heavy=True),
    Family("xception_aligned", "xception41", size=32, heavy=True),
    Family("xception_aligned, pre-activation", "xception41p", size=32, heavy=True),
    Family("nasnet", "nasnetalarge", {"num_features": 576, "stem_size": 24}, size=80, heavy=True),
    Family("pnasnet", "pnasnet5large", size=80, heavy=True),
    Family("hrnet", "hrnet_w18_small", size=32, heavy=True),
    Family("hgnet", "hgnet_tiny", size=32, heavy=True),
    Family("hgnetv2", "hgnetv2_b0"),
    Family("cspnet", "cspresnet50", size=32, heavy=True),
    Family("cspnext", "cspresnext50", size=32, heavy=True),
    Family("cspdarknet", "cspdarknet53", size=32, heavy=True),
    Family("cs3", "cs3darknet_s", heavy=True),
    Family("darknet", "darknet17", size=32, heavy=True),
    Family("vovnet", "ese_vovnet19b_slim", heavy=True),
    Family("selecsls", "selecsls42", size=32, heavy=True),
    Family("tresnet", "tresnet_m", {**ONE_EACH, "width_factor": 0.5}),
    Family("nfnet", "nfnet_f0", size=32, heavy=True),
    Family("nfnet, light", "eca_nfnet_l0", size=32, heavy=True),
    Family("dm_nfnet", "dm_nfnet_f0", size=32, heavy=True),
    Family("nf_resnet", "nf_resnet26", size=32, heavy=True),
    Family("nf_regnet", "nf_regnet_b0", size=32),
    Family("repvgg", "repvgg_a0", heavy=True),
    Family("mobileone", "mobileone_s0", heavy=True),
    Family("gernet", "gernet_s", heavy=True),
    Family("repvit", "repvit_m0_9", {"depth": [1, 1, 2, 1]}),
    Family("fasternet", "fasternet_t0"),
    Family("starnet", "starnet_s050"),
    Family("rexnet", "rexnet_100"),
    Family("rdnet", "rdnet_tiny", size=32, heavy=True),
    Family("mambaout", "mambaout_femto", SHALLOW),
    Family("edgenext", "edgenext_xx_small"),
    Family("efficientvit (MIT)", "efficientvit_b0"),
    Family("efficientvit (MSRA)", "efficientvit_m0"),
    Family("swiftformer", "swiftformer_xs"),
    Family("fastvit", "fastvit_t8"),
    Family("shvit", "shvit_s1"),
]


@dataclass(frozen=True)
class Outcome:
    """A row of the table. `failure` is the reason, empty where all went well; `time_s` is the processor's."""

    layers: int
    folded: int
    norms: int
    materialised: int
    unquantized: list[str]
    sqnr_db: dict[str, float]
    in_blocks: list[str] = field(default_factory=list)
    failure: str = ""
    time_s: float = 0.0


def build(family: Family, published: bool = False) -> nn.Module:
    """The family's network with random weights and random BatchNorm statistics, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's remarks on old names
        torch.manual_seed(0)
        network: nn.Module = timm.create_model(
            family.architecture, num_classes=10, **({} if published else family.smaller)
        )
    network.eval()
    randomise_batchnorm(network, torch.Generator().manual_seed(1), images(family))
    return network


def images(family: Family) -> torch.Tensor:
    """Sixteen images for the norms' statistics; calibration is on the first two of them."""
    return random_images(16, family.size, seed=2).contiguous(memory_format=torch.channels_last)


def check(family: Family, methods: Sequence[str] = METHODS, published: bool = False) -> Outcome:
    """Quantize the family's network by each method, through the public API alone.

    Raises:
        AssertionError: a network that was read back gives other outputs than the one that was written, or comq
            left a layer worse than nearest rounding.
        CoraqError: folding changed the function, or anything else that coraq found.
    """
    start = time.process_time()
    network, x = build(family, published), images(family)[:2]
    norms = sum(isinstance(getattr(module, "running_var", None), torch.Tensor) for module in network.modules())
    sqnr_db = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for method in methods:
            quantized = coraq.quantize(network, method, BITS, list(x.split(1)), options=OPTIONS[method], path=path)
            checkpoint = load_checkpoint(path)
            reloaded = checkpoint.module.to(memory_format=torch.channels_last)
            with torch.no_grad():
                same = torch.equal(reloaded(x), quantized.module(x))
            assert same, f"{family.architecture}, {method}: the reloaded network gives other outputs"
            assert quantized.result.fidelity is not None
            for layer in quantized.result.layers:  # comq never rounds a layer worse than nearest rounding does
                error, nearest = (layer.metrics.get(key, 0.0) for key in ("error", "rtn_error"))
                assert error <= nearest or method != "comq", f"{family.architecture}, {layer.name}: {error} > {nearest}"
            in_blocks = [layer.name for layer in quantized.result.layers if "gram_blocks" in layer.metrics]
            sqnr_db[method] = quantized.result.fidelity.sqnr_db
    structure = checkpoint.info.structure
    weighted = {n for n, m in network.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))}
    return Outcome(
        layers=len(checkpoint.layers),
        folded=len(structure.folded),
        norms=norms,
        materialised=len(structure.materialised),
        unquantized=sorted(weighted - set(checkpoint.layers)),
        sqnr_db=sqnr_db,
        in_blocks=in_blocks,
        time_s=time.process_time() - start,
    )


def attempt(family: Family, published: bool = False) -> Outcome:
    """`check`, with a failure as part of the outcome."""
    try:
        return check(family, METHODS, published)
    except Exception as error:
        return Outcome(0, 0, 0, 0, [], {}, failure=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def row(family: Family, outcome: Outcome, published: bool) -> str:
    smaller = {} if published else family.smaller
    arguments = ", ".join(f"{key}={value}" for key, value in smaller.items())
    name = f"{family.architecture}({arguments})" if arguments else family.architecture
    if outcome.failure:
        return f"| {family.name} | {name} | | | | {'fails | ' * len(METHODS)}{outcome.failure} |"
    left = outcome.norms - outcome.folded
    notes = [f"{left} norms stay: what they read is no convolution's own output"] if left else []
    notes += [f"not run by forward(): {', '.join(outcome.unquantized[:3])}"] if outcome.unquantized else []
    notes += [f"Gram in blocks: {', '.join(outcome.in_blocks[:3])}"] if outcome.in_blocks else []
    cells = [f"{outcome.sqnr_db[method]:.1f} dB" if method in outcome.sqnr_db else "–" for method in METHODS]
    return (
        f"| {family.name} | {name} | {outcome.layers} | {outcome.folded} of {outcome.norms} | {outcome.materialised} | "
        f"{' | '.join(cells)} | {'; '.join(notes)} |"
    )


HEADER = """# Every convolutional family of timm at 4 bits

Written by `python examples/families.py` (coraq {version}, timm {timm}, torch {torch}).

Each network has random weights and random BatchNorm statistics, is folded (the outputs before and after must agree
to 1e-3), quantized by each method on two images, written, read back, and compared: **the outputs of what was read
back equal those of what was written, bit for bit, in every row that has numbers.** The numbers are the SQNR of the
logits on these two images, which a method that matches the float network's outputs can fit almost exactly. On random
weights they say nothing about accuracy; they say that the signal gets through. comq takes one range and one sweep
(`-o candidates=1 -o sweeps=1`), as does the base of qera (rank 2) and cora (`-o budget=0.05`). Arguments in parentheses
cut depth or width so that the gate stays short; `pytest -m slow tests/test_families.py` runs all as published.

{passed} of {total} families pass.

| family | architecture | layers | folded norms | materialised | {methods} | note |
|---|---|---|---|---|{rules}---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families or architectures (default: all, and write the table)")
    parser.add_argument("--published", action="store_true", help="depths and widths as published")
    arguments = parser.parse_args()
    chosen = [f for f in FAMILIES if not arguments.names or {f.name, f.architecture} & set(arguments.names)]
    rows, failed = [], 0
    for family in chosen:
        outcome = attempt(family, arguments.published)
        failed += bool(outcome.failure)
        worse = outcome.sqnr_db.get("comq", math.inf) < outcome.sqnr_db.get("rtn", -math.inf)
        rows.append(row(family, outcome, arguments.published))
        print(rows[-1], f"{outcome.time_s:.1f} s", "comq < rtn" if worse else "", flush=True)
    if not arguments.names and not arguments.published:
        head = HEADER.format(
            version=coraq.__version__,
            timm=timm.__version__,
            torch=torch.__version__.split("+")[0],
            passed=len(chosen) - failed,
            total=len(chosen),
            methods=" | ".join(METHODS),
            rules="---|" * len(METHODS),
        )
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(head + "\n".join(rows) + "\n")
        print(f"wrote {RESULT}")
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
