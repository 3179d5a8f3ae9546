"""A network and its images, loaded and checked: what every run begins with."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coraq import registry
from coraq.api import MethodConfig, Quantizer
from coraq.artifact import RunFolder
from coraq.calibration.bfloat16_pass import resolve_precision
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.data import Images, Preprocess, run_images
from coraq.errors import CoraqError, UsageError
from coraq.evaluate.accuracy import FloatLogits
from coraq.events import Note, Sink, stage
from coraq.network.fold import Trace, fold
from coraq.network.load import FloatModel, load_model
from coraq.pipeline.cache import RunCache
from coraq.runtime.system import open_device


@dataclass
class Prepared:
    """A network and its images, ready to be quantized."""

    config: RunConfig
    float_model: FloatModel
    found: Trace
    preprocess: Preprocess
    images: Images
    method: type[Quantizer]
    method_source: str
    options: MethodConfig
    float_bytes: int
    float_sha256: str | None = None
    logits: FloatLogits | None = None

    @property
    def scheme(self) -> Scheme:
        """The run's scheme with what it leaves to the method decided."""
        return registry.resolve_auto(self.config.scheme, self.method, self.options)

    @property
    def teacher(self) -> nn.Module:
        return self.float_model.module

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def folder(self, runs_dir: Path) -> RunFolder:
        """Where the run lives: a name that people can read, and a hash of all that decides the result."""
        config = self.config.model_copy(update={"scheme": self.scheme})
        calibration = self.images.calibration
        bases = registry.resolve_bases(self.method, self.options)
        digest = config.digest(
            self.options.model_dump(mode="json"),
            [
                {
                    "method": base.method.name,
                    "version": base.method.version,
                    "options": base.options.model_dump(mode="json"),
                    "content": registry.plugin_content(base.method),
                }
                for base in bases
            ],
            calibration=calibration.fingerprint,
            method_version=self.method.version,
            method_content=registry.plugin_content(self.method) or "",
        )
        name = re.sub(r"[^A-Za-z0-9._]+", "-", Path(config.model.split(":")[-1]).name or config.model)
        bits = f"w{config.scheme.weights.bits}" + (
            "" if config.scheme.act_bits is None else f"a{config.scheme.act_bits}"
        )
        return RunFolder(runs_dir / f"{name}-{config.method}-{bits}-{digest}")


class Network(NamedTuple):
    """A float network, folded, and how its images are prepared."""

    float_model: FloatModel
    found: Trace
    preprocess: Preprocess
    size_bytes: int
    sha256: str


def prepare(config: RunConfig, sink: Sink, shared: RunCache) -> Prepared:
    """Check everything that can be checked, the cheap things first, and load the network."""
    method, source = registry.find(config.method)
    options = registry.configure(method, config.options)
    registry.resolve_bases(method, options)
    _check_budget(config, method)
    _check_granularity(config, method)
    device = open_device(config.device)
    config = with_precision(config, device)
    _check_paths(config.data)
    import_plugins(sink)
    # what decides the folded network and how its images are prepared
    own = config.model_dump_json(include={"model", "checkpoint", "num_classes", "model_kwargs", "device"})
    shape = config.data.model_dump_json(include={"img_size", "crop_pct", "mean", "std", "interpolation"})
    with stage(sink, "load network"):
        network = shared.get("network", (own, shape), lambda sink: _load_network(config, device))
    if not network.found.order:
        raise CoraqError(f"{config.model} has no convolution or Linear layer", "There is nothing to quantize.")
    for pattern in config.scheme.unmatched(network.found.order):
        sink(Note(f"no layer matches the override {pattern!r} (--dry-run lists their names)", "warning"))
    images = shared.get(
        "images",
        (own, config.data.model_dump_json(), config.seed),
        shared.images(lambda sink: open_images(config, network.preprocess, network.float_model, sink)),
    )
    measured_on = images.evaluation or images.calibration
    key = (own, shape, config.data.batch_size, measured_on.fingerprint)
    logits = shared.get("logits", key, lambda sink: FloatLogits()) if shared.keep_bytes is not None else None
    return Prepared(
        config,
        network.float_model,
        network.found,
        network.preprocess,
        images,
        method,
        source,
        options,
        network.size_bytes,
        network.sha256,
        logits,
    )


def with_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """The configuration with the precision that its calibration has on this device: its result depends on it."""
    precision = resolve_precision(config.data.calib_precision, config.scheme, device)
    return config.model_copy(update={"data": config.data.model_copy(update={"calib_precision": precision})})


def _check_budget(config: RunConfig, method: type[Quantizer]) -> None:
    """A budget of bytes is for a method that can choose by it."""
    if config.budget is None or hasattr(method, "budget_coding"):
        return
    able = [name for name in registry.BUILT_IN if hasattr(registry.load(name), "budget_coding")]
    raise UsageError(
        f"{config.budget} is a budget, and method {config.method} gives every layer the bits of the scheme",
        f"Take a method that chooses by a budget ({', '.join(able)}), or whole --bits from 2 to 8.",
    )


def _check_granularity(config: RunConfig, method: type[Quantizer]) -> None:
    """A method whose scales are per channel cannot have one per tensor."""
    granularity = config.scheme.weights.granularity
    known = getattr(method, "granularities", (granularity,))
    if granularity not in known:
        raise UsageError(
            f"method {config.method} has scales per {' or '.join(known)}, and --granularity is {granularity}",
            "Leave out --granularity, or take another method.",
        )


def _check_paths(data: DataConfig) -> None:
    """Folders and files that are named must exist, before anything slow begins."""
    for option, path in (
        ("--data-dir", data.data_dir),
        ("--calib-dir", data.calib_dir),
        ("--class-map", data.class_map),
    ):
        if path is not None and not Path(path).exists() and not (option == "--data-dir" and data.dataset):
            raise UsageError(f"{option} {path} does not exist", "Check the path; it is relative to the current folder.")


def import_plugins(sink: Sink) -> None:
    """Plugins may register the network's architecture; broken ones are noted."""
    for line in registry.import_plugins():
        sink(Note(line, "warning"))


def load_float(config: RunConfig, device: torch.device) -> FloatModel:
    """The float network as the run asks for it, not folded, channels last on the device."""
    float_model = load_model(config)
    float_model.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return float_model


def _load_network(config: RunConfig, device: torch.device) -> Network:
    float_model = load_float(config, device)
    size_bytes, sha256 = state_bytes(float_model.module), _weights_sha256(float_model.module)
    preprocess = Preprocess.resolve(float_model.module, config.data)
    found = fold(float_model.module, _example(preprocess, device))
    return Network(float_model, found, preprocess, size_bytes, sha256)


def open_images(config: RunConfig, preprocess: Preprocess, float_model: FloatModel, sink: Sink) -> Images:
    """The run's calibration and evaluation images, for a network of so many classes."""
    return run_images(config, preprocess, float_model.num_classes or None, sink, float_model.label_names)


def _example(preprocess: Preprocess, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *preprocess.input_size, generator=generator)
    return images.to(device, memory_format=torch.channels_last)


def state_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _weights_sha256(module: nn.Module) -> str:
    """Of names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        data = value.detach().cpu().contiguous()
        digest.update(f"{key} {data.dtype} {list(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()
