"""Names and values that options of a scheme and of the data had before, and what they are called now."""

from __future__ import annotations

from typing import Any

# by former name: the present name
FORMER_NAMES = {
    "zero_point": "zero_point_fraction",
    "bias": "bias_correction",
    "gain": "scale_correction",
    "act_mixed": "act_allocation",
    "calib_early": "calib_early_images",
    "calib_rows": "calib_rows_per_input",
}

# by present name: of each former value the present one
FORMER_VALUES: dict[str, dict[str, Any]] = {
    "zero_point_fraction": {"whole": 0, "half": 1, "quarter": 2, "eighth": 3},
    "bias_correction": {"float": "network", "keep": "off"},
    "scale_correction": {"float": "network", "keep": "off"},
    "act_allocation": {"values": "memory", "macs": "bitops"},
}


def present(name: str, value: Any) -> tuple[str, Any]:
    """Name and value of an option as they are now, from those that it may have had before."""
    name = FORMER_NAMES.get(name, name)
    values = FORMER_VALUES.get(name, {})
    return name, values.get(value, value) if isinstance(value, str) else value
