"""Grid indices as bytes, against a slow reference in Python's own integers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from waterfill.codecs.indices import pack, radix_word, row_bytes, unpack

EVERY_BYTE_SIZED = range(2, 257)
LARGER = [257, 300, 361, 511, 512, 513, 729, 830, 1000, 1023, 1024, 1025, 1296, 2047, 2048, 2187, 3125, 4095, 4096]


def slow_word(n: int) -> tuple[int, int] | None:
    """(indices, bytes) of the radix word that wastes the least, by trying all; None where bit fields do as well."""
    best = (0, 1)
    for width in range(1, 8):
        count = next(k for k in range(60) if n ** (k + 1) > 256**width)
        if count * best[1] > best[0] * width:
            best = (count, width)
    return best if 8 * best[1] < best[0] * math.ceil(math.log2(n)) else None


def slow_row(indices: Sequence[int], n: int) -> bytes:
    """One row, by the definition in the docstring of `waterfill.codecs.packing`."""
    word = slow_word(n)
    if word is None:  # one long bit string
        bits = math.ceil(math.log2(n))
        value = sum(index << (bits * i) for i, index in enumerate(indices))
        return value.to_bytes((bits * len(indices) + 7) // 8, "little")
    count, _ = word
    result = b""
    for start in range(0, len(indices), count):
        digits = indices[start : start + count]
        value = sum(digit * n**place for place, digit in enumerate(digits))
        room = n ** len(digits) - 1  # the largest number of so many digits
        result += value.to_bytes((room.bit_length() + 7) // 8, "little")
    return result


def random_indices(rows: int, count: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(n, (rows, count), generator=torch.Generator().manual_seed(seed))


def assert_packs_as_the_reference(indices: torch.Tensor, n: int) -> None:
    rows, count = indices.shape
    packed = pack(indices, n)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, row_bytes(count, n))
    assert packed.is_contiguous()
    assert [bytes(row.tolist()) for row in packed] == [slow_row(row.tolist(), n) for row in indices]
    assert torch.equal(unpack(packed, count, n), indices)


@pytest.mark.parametrize("n", [*EVERY_BYTE_SIZED, *LARGER])
def test_every_alphabet(n: int) -> None:
    per_word, _ = slow_word(n) or (8, 0)
    for count in (1, per_word - 1, per_word, per_word + 1, 3 * per_word + 2):
        random_rows = random_indices(3, count, n, seed=n)
        extremes = torch.stack([torch.zeros(count, dtype=torch.int64), torch.full((count,), n - 1)])
        assert_packs_as_the_reference(torch.cat([random_rows, extremes]), n)


@given(st.integers(2, 4096), st.integers(0, 200), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=150)
def test_any_count(n: int, count: int, rows: int, seed: int) -> None:
    assert_packs_as_the_reference(random_indices(rows, count, n, seed), n)


def test_words_are_the_best_that_fit_in_seven_bytes() -> None:
    """The shortest of those that waste the least, and never more than whole bits per index."""
    for n in range(2, 4097):
        assert radix_word(n) == slow_word(n)
        count, width = slow_word(n) or (8, math.ceil(math.log2(n)))
        assert math.log2(n) <= 8 * width / count <= math.ceil(math.log2(n))


@pytest.mark.parametrize(
    ("n", "bits"), [(2, 1), (3, 1.6), (4, 2), (6, 8 / 3), (8, 3), (15, 4), (88, 40 / 6), (200, 8), (361, 9), (4096, 12)]
)
def test_documented_rates(n: int, bits: float) -> None:
    assert 8 * row_bytes(120_000, n) == 120_000 * bits


@given(st.integers(2, 4096), st.integers(0, 20_000))
def test_a_row_takes_its_rate_rounded_up_to_a_byte(n: int, count: int) -> None:
    per_word, width = slow_word(n) or (8, math.ceil(math.log2(n)))
    assert count * math.log2(n) / 8 - 1e-6 <= row_bytes(count, n) <= math.ceil(count * width / per_word)


GOLDEN = {
    3: "38a812",
    4: "d7d7d703",
    6: "8383838305",
    8: "4fbe764f3e",
    16: "9f71dbbd17f903",
    88: "afe33079108da31a426b4b",
    4096: "ff9f002170047bd00b0db116d71125d9f2361304",
}


@pytest.mark.parametrize("n", GOLDEN)
def test_golden_bytes(n: int) -> None:
    """The format may not drift: thirteen indices of a fixed sequence."""
    indices = torch.tensor([[(7 * i * i + 3 * i + n - 1) % n for i in range(13)]])
    assert pack(indices, n).numpy().tobytes().hex() == GOLDEN[n]


def test_golden_bytes_by_hand() -> None:
    assert pack(torch.tensor([[1, 0, 2, 0, 0, 2]]), 3).tolist() == [[1 + 2 * 9, 2]]
    assert pack(torch.tensor([[1, 2, 3, 0, 3]]), 4).tolist() == [[0b00_11_10_01, 0b11]]
    assert pack(torch.tensor([[7, 0, 5]]), 8).tolist() == [[0b01_000_111, 0b1]]
    assert pack(torch.tensor([[0xABC, 0x123]]), 4096).tolist() == [[0xBC, 0x3A, 0x12]]


@pytest.mark.parametrize("n", [3, 4, 6, 8, 88, 361, 4096])
def test_any_row_can_be_read_alone(n: int) -> None:
    indices = random_indices(20, 43, n)
    packed = pack(indices, n)
    order = list(range(20))
    random.Random(0).shuffle(order)
    for i in order:
        assert torch.equal(unpack(packed[i : i + 1], 43, n), indices[i : i + 1])
    assert torch.equal(pack(indices[5:9], n), packed[5:9])
    assert torch.equal(unpack(packed[order], 43, n), indices[order])


def test_no_rows() -> None:
    assert pack(torch.empty(0, 5, dtype=torch.int64), 6).shape == (0, 2)
    assert unpack(torch.empty(0, 2, dtype=torch.uint8), 5, 6).shape == (0, 5)


@pytest.mark.parametrize("n", [3, 6, 15, 88, 361])
def test_bytes_that_no_index_has_stay_inside_the_grid(n: int) -> None:
    packed = torch.randint(256, (50, row_bytes(40, n)), dtype=torch.uint8)
    assert unpack(packed, 40, n).amax() == n - 1


@pytest.mark.parametrize("n", [3, 16, 88])
def test_long_rows(n: int) -> None:
    indices = random_indices(2, 28_672, n)
    assert torch.equal(unpack(pack(indices, n), 28_672, n), indices)
