"""Codes stored at what they are worth: an entropy coder (asymmetric numeral systems, arXiv 1311.2540) for a tensor.

All codes of a tensor are coded as independent draws from one distribution, their own histogram; the coder itself is
that of the library `constriction`. A stream is a row of bytes:

    lowest code (1), alphabet − 1 (1), one byte of frequency a symbol, CRC-32 of the codes (4), 32-bit words

with all numbers little-endian. How many codes there are is not in the stream. A frequency byte q > 0 stands for
`2^(−(q − 1)/16)` of the most frequent symbol's frequency, 0 for a symbol that does not occur: such a table costs less
than a thousandth of a bit a code more than the exact one.

A stream never has less than a byte for `MOST_CODES_PER_BYTE` codes (zeros fill it up), so that a small file cannot ask
for an arbitrary amount of memory.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_CODES_PER_BYTE = 256
_LARGEST_FREQUENCY = 1 << 16
# whole numbers, so that every machine and library has the same table
_FREQUENCIES = np.array([0] + [round(_LARGEST_FREQUENCY * 2.0 ** (-q / 16)) for q in range(255)], dtype=np.int64)
_HEADER, _CHECKSUM, _WORD = 2, 4, 4


def entropy_bits(codes: Tensor) -> float:
    """The order-0 entropy of all codes together, in bits: what coding them costs at least.

    Args:
        codes: whole numbers of any type and shape, spread over less than 2**20.
    """
    if not codes.numel():
        return 0.0
    flat = codes.reshape(-1).long()
    counts = torch.bincount(flat - flat.min()).double()
    counts = counts[counts > 0]
    return float((counts * (codes.numel() / counts).log2()).sum())


def encode(codes: Tensor) -> Tensor:
    """uint8 codes of any shape as a stream, uint8 [bytes]; the same bytes for the same codes.

    Raises:
        ValueError: the codes are not uint8.
        ImportError: `constriction` is not installed.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes to be coded must be uint8, not {codes.dtype}")
    flat = codes.detach().cpu().contiguous().reshape(-1).numpy()
    if not len(flat):
        return torch.zeros(0, dtype=torch.uint8)
    low, high = int(flat.min()), int(flat.max())
    table = _table(np.bincount(flat, minlength=high + 1)[low:])
    head = bytes((low, high - low)) + table.tobytes() + zlib.crc32(flat.tobytes()).to_bytes(_CHECKSUM, "little")
    words = np.zeros(0, dtype="<u4")
    if high > low:
        coder = _library().stream.stack.AnsCoder()
        coder.encode_reverse(flat.astype(np.int32) - low, _model(table))
        words = coder.get_compressed().astype("<u4")
    stream = head + words.tobytes()
    stream += bytes(max(0, _least_bytes(len(flat)) - len(stream)))
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def decode(stream: Tensor, count: int) -> Tensor:
    """The `count` codes of a stream: uint8 [count].

    Memory and time are bounded by the stream's own length, whatever is in it.

    Raises:
        ValueError: the stream is not one that `encode` makes of so many codes.
        ImportError: `constriction` is not installed.
    """
    if stream.dtype != torch.uint8 or stream.dim() != 1:
        raise ValueError(f"a stream of codes is a row of uint8, not {stream.dtype} {list(stream.shape)}")
    content = stream.detach().cpu().contiguous().numpy()
    if count == 0 and not len(content):
        return torch.zeros(0, dtype=torch.uint8)
    if not 0 < count <= MOST_CODES_PER_BYTE * len(content):
        raise ValueError(f"a stream of {len(content)} bytes does not hold {count} codes")
    start = _HEADER + (int(content[1]) + 1 if len(content) > 1 else 0)
    if len(content) < start + _CHECKSUM:
        raise ValueError("the stream ends within its table of frequencies")
    low, table = int(content[0]), content[_HEADER:start]
    if low + len(table) > 256:
        raise ValueError(f"the stream's alphabet goes up to {low + len(table) - 1}, beyond a byte")
    if not table[0] or not table[-1] or table[table > 0].min() != 1:
        raise ValueError("the stream's table of frequencies is none that a coder writes")
    checksum = int.from_bytes(content[start : start + _CHECKSUM].tobytes(), "little")
    words = _words(content[start + _CHECKSUM :], start + _CHECKSUM, count)
    codes = (_decode_words(words, table, count) + low).astype(np.uint8)
    if len(codes) != count or zlib.crc32(codes.tobytes()) != checksum:
        raise ValueError("the stream's codes do not match their checksum")
    return torch.from_numpy(codes)


def stream_bytes(codes: Tensor) -> int:
    """Bytes of the stream of uint8 codes, exactly."""
    return encode(codes).numel()


def _least_bytes(count: int) -> int:
    return -(-count // MOST_CODES_PER_BYTE)


def _words(rest: NDArray[np.uint8], before: int, count: int) -> NDArray[np.uint32]:
    """The coder's words from what follows the checksum, without the zeros that fill up a short stream."""
    filled = np.flatnonzero(rest)
    used = -(-(int(filled[-1]) + 1) // _WORD) * _WORD if len(filled) else 0
    if used > len(rest) or before + len(rest) != max(before + used, _least_bytes(count)):
        raise ValueError("the stream's length is not that of its words")
    return rest[:used].view("<u4").astype(np.uint32) if used else np.zeros(0, dtype=np.uint32)


def _decode_words(words: NDArray[np.uint32], table: NDArray[np.uint8], count: int) -> NDArray[np.int32]:
    if len(table) == 1:
        if len(words):
            raise ValueError("a stream of one symbol has words that say nothing")
        return np.zeros(count, dtype=np.int32)
    try:
        coder = _library().stream.stack.AnsCoder(words)
        codes: NDArray[np.int32] = coder.decode(_model(table), count)
    except ImportError:
        raise
    except BaseException as error:  # the library's own panics derive from no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(f"the stream cannot be decoded: {error}") from None
    if not coder.is_empty():
        raise ValueError("the stream holds more than its codes")
    return codes


def _table(counts: NDArray[Any]) -> NDArray[np.uint8]:
    """Frequency bytes for the counts of all symbols from the lowest to the highest."""
    share = counts / counts.max()
    steps = np.round(-16 * np.log2(np.where(counts > 0, share, 1.0)))
    return np.where(counts > 0, 1 + np.clip(steps, 0, 254), 0).astype(np.uint8)


def _model(table: NDArray[np.uint8]) -> Any:
    """The library's distribution for frequency bytes; it gives 2^−24 at least to every symbol."""
    frequencies = _FREQUENCIES[table].astype(np.float64)
    return _library().stream.model.Categorical(frequencies / frequencies.sum(), perfect=False)


def _library() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ImportError("coded weights need the package constriction: pip install constriction") from error
    return constriction
