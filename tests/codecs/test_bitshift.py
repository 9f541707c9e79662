"""The bitshift trellis: its search, its bytes, what it leaves of a matrix, and its levels in memory."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_samples import ISAS
from waterfill.base import native
from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec, rates_of
from waterfill.codecs.bitshift import rows
from waterfill.codecs.bitshift.code import (
    LEAST_LEVEL,
    MOST_LEVEL,
    NIBBLES,
    REGISTERS,
    STATES,
    WINDOW,
    Code,
    code_of,
    search,
    search_reference,
)
from waterfill.codecs.bitshift.codec import Bitshift
from waterfill.codecs.contract import Encoded
from waterfill.codecs.feedback import Feedback
from waterfill.codecs.hadamard import rotate

RATES = tuple(REGISTERS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codec_of(rate: float) -> Bitshift:
    codec = get_codec(f"bitshift-{rate:g}")
    assert isinstance(codec, Bitshift)
    return codec


def slow_level(window: int, code: Code) -> int:
    a, b, c = code.hashes.tolist()
    coarse, fine = code.parts.tolist()
    hashed = a[window % 16] ^ b[window // 16 % 16] ^ c[window // 256]
    return int(coarse[hashed // 16] + fine[hashed % 16])


def slow_levels(codes: bytes, width: int, rate: float) -> list[int]:
    """One row's levels, bit by bit as docs/format.md §11 says."""
    code = code_of(rate)
    period = max(every for _, _, every in REGISTERS[rate])
    columns = -(-width // (16 * period)) * 16 * period
    steps, at, fields = columns // 16, 0, []
    for bits, _, every in REGISTERS[rate]:
        count = columns // every
        size = -(-count * bits // 8)
        number = int.from_bytes(codes[at : at + size], "little")
        fields.append([number >> bits * i & ((1 << bits) - 1) for i in range(count)])
        at += size
    assert at == len(codes)
    levels, state = {}, [0] * len(fields)
    for lane, step in itertools.product(range(16), range(steps)):
        window = shift = 0
        for i, (bits, symbols, every) in enumerate(REGISTERS[rate]):
            if step % every == 0:
                state[i] = (state[i] << bits | fields[i][step // every * 16 + lane]) % (1 << bits * symbols)
            window |= state[i] << shift
            shift += bits * symbols
        levels[16 * step + lane] = slow_level(window, code)
    return [levels[column] for column in range(width)]


@pytest.mark.parametrize("rate", RATES)
def test_a_window_is_twelve_bits_and_a_step_brings_the_rate(rate: float) -> None:
    assert sum(bits * symbols for bits, symbols, _ in REGISTERS[rate]) == WINDOW
    assert all(bits * symbols % 4 == 0 for bits, symbols, _ in REGISTERS[rate])
    assert sum(bits / every for bits, _, every in REGISTERS[rate]) == rate
    for trellis in code_of(rate).trellises:
        for states in trellis:
            assert sorted(states.reshape(-1).tolist()) == list(range(STATES))


@pytest.mark.parametrize("rate", RATES)
def test_levels_fill_seven_bits_and_codes_come_near_the_bound(rate: float) -> None:
    code = code_of(rate)
    assert code.hashes.shape == (NIBBLES, 16)
    low, high = code.parts.astype(int).min(1).sum(), code.parts.astype(int).max(1).sum()
    assert LEAST_LEVEL <= low <= code.levels.min() < -58
    assert 58 < code.levels.max() <= high <= MOST_LEVEL
    assert 0 < rate - 0.5 * math.log2(1 / code.t2) < 0.06 + 0.06 * rate


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("width", [7, 32, 100, 576])
def test_bytes_decode_as_the_format_says(rate: float, width: int) -> None:
    codec, weight = codec_of(rate), gaussian(3, width, seed=width)
    encoded = codec.encode(weight)
    each = codec.row_bytes(width)
    stored = encoded.buffers["codes"].numpy().tobytes()
    assert len(stored) == 3 * each + 3 * each % 2
    expected = [slow_levels(stored[row * each : (row + 1) * each], width, rate) for row in range(3)]
    decoded = rotate(codec.decode(encoded))
    scales = encoded.buffers["scales"].float()
    torch.testing.assert_close(decoded, torch.tensor(expected).float() * scales[:, :1], rtol=1e-4, atol=1e-4)


@given(data=st.data(), rate=st.sampled_from(RATES), count=st.integers(1, 5), width=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_any_bytes_are_windows_and_come_back(data: st.DataObject, rate: float, count: int, width: int) -> None:
    code = code_of(rate)
    seed = data.draw(st.integers(0, 2**32 - 1))
    packed = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, rows.row_bytes(width, code)), dtype=np.uint8)
    )
    windows = rows.unpack(packed, width, code)
    assert windows.min() >= 0
    assert windows.max() < STATES
    again = rows.unpack(rows.pack(windows, code), width, code)
    assert torch.equal(again, windows)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("first", [0, 1])
def test_every_instruction_set_finds_the_path_of_the_reference(
    rate: float, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, x = code_of(rate), gaussian(19, 70, seed=3).numpy() / np.float32(code_of(rate).step)
    x[3] *= 50  # beyond what metrics count
    start = np.random.default_rng(1).integers(0, STATES, 19).astype(np.uint16)
    expected = search_reference(np.ascontiguousarray(x.T), code, start, first=first).T
    for isa in ISAS:
        monkeypatch.setenv(native.ISA_VARIABLE, isa)
        native.isa.cache_clear()
        assert np.array_equal(search(x, code, start, first=first), expected)
    native.isa.cache_clear()


def test_the_search_beats_every_short_path() -> None:
    code, x = code_of(1.0), np.float32([[30, -50, 7, 12, -80, 3]])
    start = np.uint16([0b101101])
    costs = {}
    for bits in itertools.product((0, 1), repeat=6):
        state, cost = int(start[0]), 0.0
        for bit, target in zip(bits, x[0], strict=True):
            state = (state << 1 | bit) % STATES
            cost += float(target - code.levels[state]) ** 2
        costs[bits] = cost
    found = search(x, code, start)[0]
    assert tuple(int(window) & 1 for window in found) == min(costs, key=costs.__getitem__)


@pytest.mark.parametrize("rate", RATES)
def test_what_is_left_of_a_gaussian_is_what_planning_is_told(rate: float) -> None:
    codec = codec_of(rate)
    for width in (576, 2048):
        encoded = codec.encode(gaussian(96, width, seed=5))
        measured, told = encoded.noise_power / encoded.power, codec.distortion((96, width))
        assert math.isclose(measured, told, rel_tol=0.04 if rate <= 4 else 0.1)  # which a few outliers are most of


def test_more_bits_leave_less() -> None:
    left = [codec_of(rate).distortion((64, 1024)) for rate in RATES]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("rate", [1.5, 2.0, 3.0, 4.0])
def test_feedback_pushes_errors_where_they_cost_little(rate: float) -> None:
    codec, width = codec_of(rate), 512
    mixing = torch.linalg.qr(gaussian(width, width, seed=1))[0]
    moments = mixing @ torch.diag(torch.logspace(0, -3, width)) @ mixing.T
    feedback, weight = Feedback(moments), gaussian(48, width, seed=2)

    def cost(errors: Feedback | None) -> float:
        encoder = codec.encoder((48, width), feedback=errors)
        pieces = {piece.key: piece.data for piece in encoder.add(weight)}
        buffers = {"scales": pieces["scales"], "codes": torch.as_tensor(pieces["codes"])}
        decoded = codec.decode(Encoded((48, width), buffers, 0, 0.0, 0.0))  # type: ignore[arg-type]
        return feedback.cost(rotate(decoded - weight))

    expected = feedback.left(codec.feedback(width)).loss
    assert cost(feedback) < cost(None) * (expected + 0.15)
    assert expected < 0.75


def test_zeros_stay_zeros_and_outliers_do_no_harm() -> None:
    weight = torch.zeros(4, 96)
    weight[1], weight[2, 5] = 1e-3, 1e6
    decoded = codec_of(3.0).decode(codec_of(3.0).encode(weight, exponent=8))
    assert torch.equal(decoded[0], torch.zeros(96))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", [f"bitshift{rate}" for rate in ("-0.5", "-2.25", "-6", "-02", "-2.0", "", "-")])
def test_names_of_no_codec_are_refused(name: str) -> None:
    with pytest.raises(WaterfillError, match=r"bitshift-2\.5"):
        get_codec(name)


def test_the_family_comes_in_rates() -> None:
    found = rates_of("bitshift")
    assert found is not None
    assert found.codec(2.5).name == "bitshift-2.5"
    assert rates_of("bitshift-2") is None


def test_golden_bytes() -> None:
    digest = hashlib.sha256()
    for rate in RATES:
        encoded = codec_of(rate).encode(gaussian(5, 80, seed=11))
        digest.update(encoded.buffers["codes"].numpy().tobytes())
    assert digest.hexdigest()[:16] == "76e38797f927f9b4"
