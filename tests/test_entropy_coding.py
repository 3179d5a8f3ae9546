"""Codes as a stream: nothing is lost, the size is the entropy's, and hostile streams are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coraq.core.entropy_coding import MOST_CODES_PER_BYTE, decode, encode, entropy_bits, stream_bytes


def _codes(alphabet: int, low: int, count: int, seed: int, skew: float) -> Tensor:
    """Codes from `low` on, the higher the rarer."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.exp(-skew * torch.arange(alphabet).float()).clamp(min=1e-12)
    return (torch.multinomial(chances, count, replacement=True, generator=generator) + low).to(torch.uint8)


@settings(deadline=None, max_examples=150)
@given(
    alphabet=st.integers(1, 255),
    count=st.integers(1, 3000),
    seed=st.integers(0, 1000),
    skew=st.floats(0, 3),
    data=st.data(),
)
def test_every_stream_decodes_to_its_codes(
    alphabet: int, count: int, seed: int, skew: float, data: st.DataObject
) -> None:
    codes = _codes(alphabet, data.draw(st.integers(0, 256 - alphabet)), count, seed, skew)
    stream = encode(codes)
    assert torch.equal(decode(stream, count), codes)
    assert stream.numel() == stream_bytes(codes)


@pytest.mark.parametrize("codes", [[], [0], [255], [7] * 100_000, [0, 255], [0] * 70_000 + [255]])
def test_the_smallest_and_the_emptiest_layers_have_streams(codes: list[int]) -> None:
    codes_ = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(decode(encode(codes_), len(codes)), codes_)


def test_codes_of_any_shape_are_coded_in_their_order() -> None:
    codes = _codes(9, 3, 24, 0, 0.1).reshape(2, 3, 4)
    assert torch.equal(decode(encode(codes.mT), 24), codes.mT.reshape(-1))


@pytest.mark.parametrize("skew", [0.01, 0.3, 2.0])
def test_a_stream_takes_its_entropy_and_its_table(skew: float) -> None:
    codes = _codes(40, 100, 200_000, 1, skew)
    bits = entropy_bits(codes)
    assert bits / 8 <= stream_bytes(codes) <= bits / 8 * 1.002 + 40 + 16


def test_entropy_is_that_of_the_histogram() -> None:
    codes = torch.tensor([-3, -3, 5, 7], dtype=torch.int32)
    assert entropy_bits(codes) == pytest.approx(4 * 1.5)
    assert entropy_bits(torch.zeros(10)) == 0
    assert entropy_bits(torch.zeros(0)) == 0
    assert entropy_bits(torch.arange(8)) == pytest.approx(8 * math.log2(8))


def test_a_truncated_stream_is_refused_wherever_it_ends() -> None:
    codes = _codes(20, 118, 500, 2, 0.2)
    stream = encode(codes)
    for length in range(stream.numel()):
        with pytest.raises(ValueError, match="stream"):
            decode(stream[:length], 500)


def test_a_flipped_bit_is_refused_wherever_it_is() -> None:
    codes = _codes(20, 118, 500, 2, 0.2)
    stream = encode(codes)
    for bit in range(8 * stream.numel()):
        flipped = stream.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="stream"):
            decode(flipped, 500)


@pytest.mark.parametrize("count", [0, 1, 499, 501, 10**15, -1])
def test_a_wrong_count_is_refused(count: int) -> None:
    stream = encode(_codes(20, 118, 500, 2, 0.2))
    with pytest.raises(ValueError, match="stream"):
        decode(stream, count)


def test_a_small_stream_stands_for_no_huge_tensor() -> None:
    zeros = encode(torch.zeros(1_000_000, dtype=torch.uint8))
    assert zeros.numel() == math.ceil(1_000_000 / MOST_CODES_PER_BYTE)
    with pytest.raises(ValueError, match="does not hold"):
        decode(encode(torch.zeros(8, dtype=torch.uint8)), 1_000_000)


@settings(deadline=None, max_examples=300)
@given(content=st.binary(max_size=200), count=st.integers(0, 5000))
def test_whatever_is_no_stream_is_refused_or_decoded_within_bounds(content: bytes, count: int) -> None:
    stream = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
    try:
        codes = decode(stream, count)
    except ValueError:
        return
    assert codes.shape == (count,)


def test_only_bytes_are_coded() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode(torch.zeros(3))
    with pytest.raises(ValueError, match="uint8"):
        decode(torch.zeros(3), 1)
