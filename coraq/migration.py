"""What earlier versions of coraq wrote, as this one reads it.

Version 1 had a flat scheme with other names (`former_names`), in checkpoints (`format_version` 1) and in the
`metrics.json` of runs. Content that is not of that version is returned as it is, and so is content that is no
mapping at all: validating it is the models' business.
"""

from __future__ import annotations

from typing import Any

from coraq.former_names import present
from coraq.scheme import SCHEME_OPTIONS

# What an option was where a file does not name it, because it is older than the option.
_BEFORE_THE_OPTION = {"zero_point": "whole", "column_scale": "none"}
_BEFORE_THE_DATA_OPTION = {"calib_early": 0, "calib_precision": "float32"}


def upgrade_checkpoint(content: Any) -> Any:
    """Metadata of a checkpoint of `format_version` 1 as of version 2."""
    if not isinstance(content, dict) or content.get("format_version") != 1:
        return content
    return {**content, "format_version": 2, "scheme": upgrade_scheme(content.get("scheme", {"version": 1}))}


def upgrade_config(content: Any) -> Any:
    """A run's configuration of version 1 as of version 2."""
    if not isinstance(content, dict) or content.get("version") != 1:
        return content
    data = content.get("data", {})
    if isinstance(data, dict):
        data = dict(present(name, value) for name, value in {**_BEFORE_THE_DATA_OPTION, **data}.items())
    return {**content, "version": 2, "data": data, "scheme": upgrade_scheme(content.get("scheme", {"version": 1}))}


def upgrade_scheme(content: Any) -> Any:
    """A flat scheme of version 1 as a nested one of version 2. Names that it never had are kept, to be refused."""
    if not isinstance(content, dict) or content.get("version") != 1:
        return content
    scheme: dict[str, Any] = {"version": 2, "weights": {}, "activations": {}, "corrections": {}}
    for former, value in {**_BEFORE_THE_OPTION, **content}.items():
        name, value = present(former, value)
        if name in ("first_bits", "last_bits") and value is None:
            value = "same"  # None has come to mean that it is left to the method
        if name in SCHEME_OPTIONS:
            part, field = SCHEME_OPTIONS[name]
            (scheme if part is None else scheme[part])[field] = value
        elif name != "version":
            scheme[name] = value
    for edge in ("first_bits", "last_bits"):
        scheme["weights"].setdefault(edge, 8)
    if scheme["activations"].get("bits") is None:
        scheme["activations"] = None
    return scheme
