"""Codes of widths that ONNX has no type for, as bytes that hold their bits and nothing else.

The blob is uint8 [m, bits], m = ⌈n/8⌉: bit `k` of byte [j, b] is bit `b` of code `k·m + j`. Five standard operators
make integers of it, all constant, so that a runtime folds them when it loads the file:

    BitShift(blob, 0 … 7) → BitwiseAnd 1     [8, m, bits], the bits apart
    MatMulInteger by 1, 2, 4, …              [8, m, 1], int32; the last weight is negative in two's complement
    [Reshape → Slice →] Reshape → Cast

BitwiseAnd is the youngest of them: opset 18.
"""

from __future__ import annotations

import numpy as np

LANES = 8  # codes that share a byte


def to_blob(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [n] (two's complement where negative) as uint8 [⌈n/8⌉, bits]."""
    rows = -(-values.size // LANES)
    padded = np.zeros(rows * LANES, dtype=np.uint8)
    padded[: values.size] = values.astype(np.int64) & (2**bits - 1)
    lanes = padded.reshape(LANES, rows)
    blob = np.zeros((rows, bits), dtype=np.uint8)
    for bit in range(bits):
        for lane in range(LANES):
            blob[:, bit] |= (lanes[lane] >> np.uint8(bit) & np.uint8(1)) << np.uint8(lane)
    return blob


def from_blob(blob: np.ndarray, count: int) -> np.ndarray:
    """The inverse: the `count` unsigned bit patterns, uint8 (those of −1 are all ones)."""
    rows, bits = blob.shape
    lanes = np.zeros((LANES, rows), dtype=np.uint8)
    for bit in range(bits):
        for lane in range(LANES):
            lanes[lane] |= (blob[:, bit] >> np.uint8(lane) & np.uint8(1)) << np.uint8(bit)
    return lanes.reshape(-1)[:count]


def bit_weights(bits: int, signed: bool) -> np.ndarray:
    """What each bit is worth: int8 [bits, 1], at most 7 bits."""
    weights = 2 ** np.arange(bits)
    weights[-1] *= -1 if signed else 1
    return weights.astype(np.int8).reshape(-1, 1)
