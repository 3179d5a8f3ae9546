"""Codes of 1 to 8 bits in a stream of bytes: 3-bit codes really take 3 bits.

Each row is a little-endian bit stream of its own, padded with zero bits to a whole byte: code k of a row holds the
bits `k·bits … (k+1)·bits − 1`, the lowest first; bit i of the stream is bit `i mod 8` of byte `i // 8`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] below 2**bits → uint8 [rows, row_bytes]. ValueError for codes out of range."""
    _check(bits)
    rows, columns = codes.shape
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must be uint8 below {2**bits}")
    if bits == 8:
        return codes.contiguous()
    # eight codes fill exactly `bits` bytes: work on groups of eight in one 64-bit word
    groups = -(-columns // 8)
    padded = torch.zeros(rows, groups * 8, dtype=torch.int64)
    padded[:, :columns] = codes
    shifts = torch.arange(8, dtype=torch.int64) * bits
    words = (padded.view(rows, groups, 8) << shifts).sum(-1)
    out = (words[..., None] >> (torch.arange(bits, dtype=torch.int64) * 8)) & 255
    return out.to(torch.uint8).view(rows, groups * bits)[:, : row_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, row_bytes] → uint8 [rows, columns]. ValueError for a wrong size."""
    _check(bits)
    rows = packed.shape[0]
    if packed.dtype != torch.uint8 or packed.shape[1] != row_bytes(columns, bits):
        raise ValueError(
            f"{columns} codes of {bits} bits need {row_bytes(columns, bits)} bytes a row, not {packed.shape[1]}"
        )
    if bits == 8:
        return packed.contiguous()
    groups = -(-columns // 8)
    padded = torch.zeros(rows, groups * bits, dtype=torch.int64)
    padded[:, : packed.shape[1]] = packed
    words = (padded.view(rows, groups, bits) << (torch.arange(bits, dtype=torch.int64) * 8)).sum(-1)
    codes = (words[..., None] >> (torch.arange(8, dtype=torch.int64) * bits)) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, groups * 8)[:, :columns].contiguous()


def _check(bits: int) -> None:
    # seven bits × eight codes still fit a signed 64-bit word; eight-bit codes are stored as they are
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; 1 to 8 can")
