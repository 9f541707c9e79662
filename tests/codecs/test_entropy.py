"""rANS: tables, streams, damage; the native coder against the one in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.kernel_samples import ISAS, LIBRARY, needs_native
from waterfill.codecs.entropy import (
    DamagedError,
    code_length_bits,
    encode,
    from_counts,
    gaussian,
    gaussian_parameter,
    lanes_for,
)
from waterfill.codecs.entropy.fields import pack_fields, unpack_fields
from waterfill.codecs.entropy.rans import _encode, decode_reference
from waterfill.codecs.entropy.tables import TOTAL, Frequencies, alias_slots

counts_of_symbols = st.lists(st.integers(0, 1_000_000), min_size=1, max_size=256).filter(any).map(np.array)


def native_decode(isa: str, data: bytes, lanes: int, table: Frequencies, count: int) -> np.ndarray | None:
    """Symbols, or None where the library refuses."""
    assert LIBRARY is not None
    source, out = np.frombuffer(data, np.uint8), np.empty(count, np.uint8)
    good = LIBRARY.rans_decode(LIBRARY.isas[isa], source, out, lanes=lanes, frequencies=table)
    return out if good else None


def reference_decode(data: bytes, lanes: int, table: Frequencies, count: int) -> np.ndarray | None:
    try:
        return decode_reference(data, lanes, table, count)
    except DamagedError:
        return None


def drawn(counts: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(counts), count, p=counts / counts.sum()).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- tables


@given(counts_of_symbols)
def test_a_table_sums_to_4096_and_no_exchange_shortens_the_code(counts: np.ndarray) -> None:
    table = from_counts(counts).astype(np.int64)
    assert table.sum() == TOTAL
    assert ((table[: len(counts)] > 0) == (counts > 0)).all()
    used = np.flatnonzero(counts)
    gain = counts[used] * np.log2((table[used] + 1) / table[used])
    shrinkable = table[used] > 1
    if shrinkable.any():
        loss = (counts[used] * np.log2(table[used] / np.maximum(table[used] - 1, 1)))[shrinkable]
        assert gain.max() <= loss.min() * (1 + 1e-9) + 1e-6


def test_bad_counts_are_refused() -> None:
    for counts in (np.zeros(3, np.int64), np.ones(257, np.int64)):
        with pytest.raises(ValueError, match="have no table"):
            from_counts(counts)
    assert code_length_bits(np.array([1, 1]), from_counts(np.array([1, 0]))) == math.inf


@given(counts_of_symbols)
def test_the_alias_method_gives_every_symbol_its_slots_once(counts: np.ndarray) -> None:
    table = from_counts(counts)
    symbol, number = alias_slots(table.tolist())
    assert (np.bincount(symbol, minlength=256) == table).all()
    for s in np.flatnonzero(table):
        assert sorted(number[symbol == s]) == list(range(table[s]))
    buckets = symbol.reshape(max(16, 1 << int(np.flatnonzero(table).max()).bit_length()), -1)
    assert max(len(set(bucket)) for bucket in buckets.tolist()) <= 2


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("deviation", [0.2, 1.0, 4.0, 20.0, 90.0])
def test_the_gaussian_table_is_that_of_a_gaussian(deviation: float, offset: int) -> None:
    reach = max(1, math.ceil(4.5 * deviation / 4))
    symbols, center = 2 * reach + 1, reach
    table = gaussian(gaussian_parameter(deviation**2), symbols, center, offset).astype(np.float64)
    p = 4.0 * (np.arange(symbols) - center) + offset
    exact = np.exp(-(p**2) / (2 * deviation**2))
    exact /= exact.sum()
    assert table.sum() == TOTAL
    assert (table[:symbols] >= 1).all()
    assert np.abs(table[:symbols] / TOTAL - exact).max() < 2 * symbols / TOTAL + 1e-3


def test_golden_gaussian_tables() -> None:
    """They are part of the format: rounding must be the same on every machine."""
    assert gaussian(3_900_000_000, 7, 3, 1)[:7].tolist() == GOLDEN_TABLE


GOLDEN_TABLE = [1, 26, 1204, 2604, 258, 2, 1]


# ------------------------------------------------------------------------------------------------------------- streams


@settings(max_examples=60)
@given(counts_of_symbols, st.sampled_from([1, 2, 4, 8, 16, 32]), st.integers(0, 300), st.integers(0, 9))
def test_symbols_come_back_from_every_coder(counts: np.ndarray, lanes: int, steps: int, seed: int) -> None:
    symbols, table = drawn(counts, lanes * steps, seed), from_counts(counts)
    data = encode(symbols, lanes, table)
    assert data == _encode(symbols, lanes, table)
    assert (decode_reference(data, lanes, table, len(symbols)) == symbols).all()
    for isa in ISAS:
        found = native_decode(isa, data, lanes, table, len(symbols))
        assert found is not None
        assert (found == symbols).all()


@pytest.mark.parametrize("symbols", [1, 2, 9, 16, 17, 32, 33, 80, 256])
def test_the_length_is_that_of_the_entropy(symbols: int) -> None:
    """Within half a percent, the two bytes that every lane costs aside."""
    counts = (
        np.round(1e6 * np.exp(-(((np.arange(symbols) - symbols / 2) / (0.2 * symbols)) ** 2) / 2)).astype(np.int64) + 1
    )
    sample = drawn(counts, 1 << 17, 0)
    own = np.bincount(sample, minlength=symbols)
    table, lanes = from_counts(own), lanes_for(len(sample))
    share = own[own > 0] / len(sample)
    entropy = -float((share * np.log2(share)).sum()) * len(sample)
    length = 8 * len(encode(sample, lanes, table)) - 16 * lanes
    assert lanes == 32
    assert entropy <= length + 16 * lanes
    assert length <= 1.005 * entropy + 40 * lanes
    assert code_length_bits(own, table) == pytest.approx(length, rel=2e-3, abs=40 * lanes)


def test_a_symbol_without_a_frequency_is_refused() -> None:
    table = from_counts(np.array([3, 0, 1]))
    for coder in (encode, _encode):
        with pytest.raises(ValueError, match="has no frequency"):
            coder(np.array([0, 1], np.uint8), 1, table)


def test_lanes_by_length() -> None:
    assert [lanes_for(n) for n in (0, 1, 8191, 8192, 65536, 131071, 131072, 10**9)] == [1, 1, 1, 2, 16, 16, 32, 32]


# -------------------------------------------------------------------------------------------------------------- damage


@settings(max_examples=150)
@given(st.data())
def test_damage_is_refused_by_all_or_read_alike_by_all(data: st.DataObject) -> None:
    lanes = data.draw(st.sampled_from([1, 4, 32]))
    counts = np.array([900, 400, 90, 9, 1])
    symbols, table = drawn(counts, lanes * 40, data.draw(st.integers(0, 5))), from_counts(counts)
    good = bytearray(encode(symbols, lanes, table))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "longer", "shorter"]))
    count = len(symbols)
    if kind == "flip":
        good[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del good[data.draw(st.integers(0, len(good) - 1)) :]
    elif kind == "grow":
        good += data.draw(st.binary(min_size=1, max_size=9))
    else:
        count += lanes if kind == "longer" else -lanes
    found = reference_decode(bytes(good), lanes, table, count)
    assume(kind == "flip" or found is None or kind in ("longer", "shorter"))
    assert kind in ("flip", "longer", "shorter") or found is None
    for isa in ISAS:
        other = native_decode(isa, bytes(good), lanes, table, count)
        assert (other is None) == (found is None)
        assert found is None or other is None or (other == found).all()


@needs_native
def test_nonsense_is_refused() -> None:
    assert LIBRARY is not None
    table, out = from_counts(np.array([1, 1])), np.zeros(64, np.uint8)
    wrong = table.copy()
    wrong[0] += 1
    isa = next(iter(LIBRARY.isas.values()))
    for bytes_given, lanes, frequencies, count in (
        (4, 3, table, 3),
        (4, 64, table, 64),
        (4, 2, table, 3),
        (-1, 1, table, 1),
        (4, 1, wrong, 1),
        (4, 1, table, -1),
    ):
        arguments = (out.ctypes.data, bytes_given, lanes, frequencies.ctypes.data, count, out.ctypes.data)
        assert LIBRARY.raw.wf_rans_decode(isa, *arguments) != 0


@given(st.integers(1, 16), st.integers(0, 50), st.integers(0, 99))
def test_bit_fields(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, count)
    data = pack_fields(values, bits)
    assert len(data) == -(-count * bits // 8)
    assert (unpack_fields(data, count, bits) == values).all()
