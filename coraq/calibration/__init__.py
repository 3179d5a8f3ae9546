"""The calibration engine: one pass through the float and the quantized network, and what methods learn from it."""
