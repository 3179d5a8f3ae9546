"""Packed codes: every width, every shape, back bit for bit, in exactly the bytes that were promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coraq.core.packing import pack, row_bytes, unpack


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 40))
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(codes, dtype=torch.uint8).reshape(rows, columns), bits


def slowly_packed(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """The definition, bit by bit: code k holds bits k·bits … of its row's stream, the lowest first."""
    packed = []
    for row in codes.tolist():
        stream = sum(code << (k * bits) for k, code in enumerate(row))
        packed.append(list(stream.to_bytes(row_bytes(len(row), bits), "little")))
    return packed


@given(rows_of_codes())
def test_unpacking_gives_back_every_code(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


@given(rows_of_codes())
def test_packing_follows_its_definition_bit_by_bit(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    assert pack(codes, bits).tolist() == slowly_packed(codes, bits)


@given(st.integers(1, 8), st.integers(0, 10_000))
def test_a_row_takes_its_bits_rounded_up_to_a_byte(bits: int, columns: int) -> None:
    size = row_bytes(columns, bits)
    assert 0 <= 8 * size - columns * bits < 8


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"below {2**bits}"):
        pack(torch.tensor([[2**bits]], dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="cannot be packed"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize(("columns", "size"), [(9, 3), (8, 4), (5, 3)])
def test_a_packed_row_of_the_wrong_size_is_refused(columns: int, size: int) -> None:
    with pytest.raises(ValueError, match="need"):
        unpack(torch.zeros(2, size, dtype=torch.uint8), 3, columns)


def test_codes_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(1, 8), 4)
    with pytest.raises(ValueError, match="need"):
        unpack(torch.zeros(1, 4), 4, 8)
