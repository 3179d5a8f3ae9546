"""Accuracy of the quantized network, and its fidelity to the float one."""

from coraq.evaluate.accuracy import compare_networks, evaluate_network

__all__ = ["compare_networks", "evaluate_network"]
