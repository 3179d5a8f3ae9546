"""The grid: which runs a comparison consists of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coraq import registry
from coraq.config import RunConfig
from coraq.errors import UsageError

_COMMA = re.compile(r",(?![^\[{]*[\]}])")  # a list as an option's value may hold commas


@dataclass(frozen=True)
class Variant:
    """A method with options: one column of the comparison. `label` is what the user wrote."""

    label: str
    method: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    variant: Variant
    config: RunConfig

    @property
    def name(self) -> str:
        """What a person calls it: "resnet18 comq W4 seed 0"."""
        config = self.config
        return f"{model_name(config.model)} {self.variant.label} W{config.scheme.weights.bits} seed {config.seed}"


def model_name(model: str) -> str:
    """The last part of a model's name: the folder of `local-dir:…`, the name of `hf-hub:…`."""
    return Path(model.split(":")[-1]).name or model


def split_items(text: str) -> list[str]:
    """ "a,b:x=[1,2]" → ["a", "b:x=[1,2]"]."""
    return [item.strip() for item in _COMMA.split(text) if item.strip()]


def parse_variants(text: str, parse_value: Any) -> list[Variant]:
    """ "comq,cora:preset=paper:rank=4" → two variants, each checked against its method's own options.

    Raises:
        UsageError: an unknown method or option, a value out of range, or the same item twice.
        CoraqError: a method that is broken.
    """
    variants: list[Variant] = []
    for item in split_items(text):
        method, *settings = item.split(":")
        options: dict[str, Any] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or not key or key in options:
                raise UsageError(
                    f"--methods {item!r}: {setting!r} is not KEY=VALUE once", "write METHOD:KEY=VALUE:KEY=VALUE"
                )
            options[key] = parse_value(value)
        registry.configure(registry.find(method)[0], options)
        if any(item == other.label for other in variants):
            raise UsageError(f"--methods {item!r} is given twice", "give each method once, or with other options")
        variants.append(Variant(item, method, options))
    if not variants:
        raise UsageError("--methods names no method", "`coraq methods` lists them")
    return variants


def expand(
    base: RunConfig, models: Iterable[str], variants: Sequence[Variant], bits: Iterable[int], seeds: Iterable[int]
) -> list[Cell]:
    """All cells, those that share most next to each other: by model, seed, bits, method."""
    bits, seeds = list(bits), list(seeds)
    return [
        Cell(
            variant,
            base.model_copy(
                update={
                    "model": model,
                    "method": variant.method,
                    "options": variant.options,
                    "scheme": base.scheme.replace(bits=width),
                    "seed": seed,
                }
            ),
        )
        for model in models
        for seed in seeds
        for width in bits
        for variant in variants
    ]
