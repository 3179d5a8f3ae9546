"""A folder that `timm.create_model("local-dir:…", pretrained=True)` opens anywhere, without coraq.

timm builds the original architecture, so folded BatchNorms are there again: each gets the identity's statistics, and
the folded bias as its own. The weights are on the grid, in float: the folder is as large as the float network, and
its model card says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from coraq.artifact import Checkpoint
from coraq.artifact.files import write_atomic
from coraq.errors import CoraqError
from coraq.network.load import build
from coraq.scheme import span


def unfolded_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A state dict of the original timm architecture that computes what the folded student computes.

    Raises:
        CoraqError: the checkpoint holds what the original architecture cannot (activation grids, a weight that it
            computes from another one).
    """
    info = checkpoint.info
    if getattr(info, "activations", None):
        raise CoraqError(
            "a timm folder cannot hold activation grids", "Export to ONNX, or a run of the same weights without them."
        )
    if info.structure.materialised:
        name = next(iter(info.structure.materialised))
        raise CoraqError(
            f"{info.architecture} computes the weight of {name} (weight standardisation): a weight on the grid is no "
            "parameter of it",
            "Export to ONNX or pt2 instead.",
        )
    original = build(info.architecture, info.model_args, info.pretrained_cfg)
    state = original.state_dict()
    folded_state = checkpoint.module.state_dict()
    modules: dict[str, Any] = dict(original.named_modules())
    absorbed = {layer: norm for norm, layer in info.structure.folded.items()}
    for key in state:
        if key in folded_state:
            state[key] = folded_state[key].detach().clone()
    for layer, norm in absorbed.items():
        bias = folded_state[f"{layer}.bias"].detach()
        _identity(state, modules[norm], norm, bias, f"{layer}.bias")
    lost = [key for key in folded_state if key not in state and key.removesuffix(".bias") not in absorbed]
    if lost:
        layer = lost[0].removesuffix(".bias")
        if folded_state[lost[0]].abs().max() > 0:
            raise CoraqError(
                f"{info.architecture} has no parameter {lost[0]}: bias correction gave {layer} a bias",
                "Quantize with --bias-correction off, or export to ONNX or pt2.",
            )
    return {key: value.contiguous() for key, value in state.items()}


def _identity(state: dict[str, Tensor], norm: Any, name: str, bias: Tensor, own: str) -> None:
    """Statistics under which a norm only adds `bias`: γ/√(σ² + ε) is 1 to the last bit of float32."""
    gain = torch.ones_like(bias)
    variance = torch.ones_like(bias)
    if getattr(norm, "weight", None) is not None:
        # γ = √(1 + ε) would round; with σ² = 1 − ε the root is of (nearly) 1 for every kernel
        variance = variance - norm.eps
        state[f"{name}.weight"] = gain
    else:
        variance = variance - norm.eps
    state[f"{name}.running_var"] = variance
    if getattr(norm, "bias", None) is not None:
        state[f"{name}.running_mean"] = torch.zeros_like(bias)
        state[f"{name}.bias"] = bias.clone()
    else:
        state[f"{name}.running_mean"] = -bias
    if own in state:  # the layer had a bias beside the norm's: it is in the norm now
        state[own] = torch.zeros_like(state[own])


def write_timm_folder(checkpoint: Checkpoint, folder: Path) -> int:
    """Write config.json, model.safetensors and README.md; returns the bytes of all three."""
    state = unfolded_state(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save(state, {"format": "pt"})
    config = json.dumps(hub_config(checkpoint), indent=2, ensure_ascii=False) + "\n"
    card = model_card(checkpoint, len(weights))
    write_atomic(folder / "model.safetensors", weights)
    write_atomic(folder / "config.json", config)
    write_atomic(folder / "README.md", card)
    return len(weights) + len(config.encode()) + len(card.encode())


def hub_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json as timm writes it for the hub."""
    info = checkpoint.info
    hidden = ("architecture", "num_classes", "label_names", "label_descriptions", "hf_hub_id", "url", "tag")
    pretrained = {key: value for key, value in info.pretrained_cfg.items() if key not in hidden}
    pretrained |= {key: value for key, value in info.preprocess.items() if key != "input_size"}
    pretrained["input_size"] = list(info.preprocess["input_size"])
    config: dict[str, Any] = {
        "architecture": info.architecture,
        "num_classes": int(getattr(checkpoint.module, "num_classes", 0)),
        "num_features": int(getattr(checkpoint.module, "num_features", 0)),
        "pretrained_cfg": pretrained,
    }
    for key in ("label_names", "label_descriptions"):
        if info.pretrained_cfg.get(key):
            config[key] = info.pretrained_cfg[key]
    arguments = {key: value for key, value in info.model_args.items() if key != "num_classes"}
    if arguments:
        config["model_args"] = arguments
    return config


def model_card(checkpoint: Checkpoint, size_bytes: int) -> str:
    """README.md for the hub: what this is, and that it is not small."""
    info = checkpoint.info
    method, model = info.provenance.get("method", "?"), info.provenance.get("model", info.architecture)
    layer_bits = {name: layer.weight.bits for name, layer in checkpoint.layers.items()}
    bits = sorted(set(layer_bits.values()))
    return f"""---
library_name: timm
tags:
- image-classification
- timm
- quantized
---
# {info.architecture}, weights of {span(layer_bits.values())} bits

Made from `{model}` by [coraq](https://pypi.org/project/coraq/) {info.provenance.get("coraq", "")}, method `{method}`:
{info.scheme.describe(layer_bits)}.

**These are float32 weights**: {size_bytes / 1e6:.1f} MB, as large as the float network, and as fast. Every value lies
on the grid of its channel ({", ".join(map(str, bits))}-bit codes), so that timm alone, without coraq, shows what the
quantized network answers. The small file is the coraq checkpoint ({checkpoint.size_bytes / 1e6:.2f} MB) or its ONNX
export (`coraq export`).

```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True)  # on the hub: hf-hub:OWNER/NAME
```

Calibrated on: {info.provenance.get("calibration", "?")}. The license is that of the original weights.
"""


def weights_on_grid(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether every quantized weight in the folder is the checkpoint's, bit for bit."""
    state = load_file(folder / "model.safetensors")
    return all(
        torch.equal(state[f"{name}.weight"].reshape(layer.weight.codes.shape), layer.dequantize())
        for name, layer in checkpoint.layers.items()
    )
