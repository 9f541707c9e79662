"""Error feedback: against conditional expectations, against no feedback, and against what was predicted of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from waterfill.base.errors import WaterfillError
from waterfill.codecs import BufferLayout, Codec, Encoded, Higgs, buffer_bytes, get_codec
from waterfill.codecs.feedback import DAMPING, Feedback, columns_of, expected, interleaved, order_of, runs
from waterfill.codecs.hadamard import rotate

CODECS = ("trellis-s64-r3.0000", "trellis-s8-r4.5000", "higgs-p1-n16", "higgs-p2-n64", "higgs-p3-n512")
DTYPES = {"U8": torch.uint8, "F16": torch.float16}


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    """What has a few strong directions and many weak ones, as activations have."""
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator) * torch.exp(-5 * torch.arange(width) / width)
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) @ mixing.T


def moments(tokens: int, width: int, seed: int = 0) -> Tensor:
    x = inputs(tokens, width, seed)
    return x.T @ x


def weights(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def packed(
    codec: Codec, weight: Tensor, feedback: Feedback | None, rho: float = 1.0
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Buffers that an encoder gives, and what they decode to."""
    shape = (weight.shape[0], weight.shape[1])
    encoder = codec.encoder(shape, rho=rho, feedback=feedback)
    layout = codec.layout(shape)
    raw = {key: np.zeros(buffer_bytes(part), np.uint8) for key, part in layout.items()}
    for piece in itertools.chain(*map(encoder.add, weight.split(encoder.block_rows)), encoder.finish()):
        data = piece.data
        some = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.contiguous().view(torch.uint8).numpy()
        raw[piece.key][piece.offset_bytes : piece.offset_bytes + some.size] = some.reshape(-1)
    buffers = {key: _typed(raw[key], part) for key, part in layout.items()}
    return buffers, codec.decode(Encoded(shape, buffers, 0, noise_power=0.0, power=0.0))


def _typed(data: np.ndarray, part: BufferLayout) -> Tensor:
    return torch.from_numpy(data).view(DTYPES[part.dtype]).view(part.shape)


def cost(error: Tensor, of: Tensor) -> float:
    return float(((error @ of) * error).double().sum())


@pytest.mark.parametrize("blocks", [runs(96, 1), runs(96, 7), interleaved(96, 32), interleaved(96, 4)])
def test_a_block_makes_up_for_what_the_ones_before_it_lost(blocks: tuple[slice, ...]) -> None:
    """As well as can be: what is expected of it and of all later columns, given those errors, is least."""
    feedback = Feedback(moments(300, 96))
    order = order_of(blocks, 96).numpy()
    damped = feedback.moments.double().numpy() + DAMPING * feedback.mean * np.eye(96)
    damped, end = damped[np.ix_(order, order)], 0
    for push, columns in zip(feedback.pushes(blocks), columns_of(blocks, 96), strict=True):
        best = np.linalg.solve(damped[end:, end:], damped[end:, :end])[: len(columns)].T
        np.testing.assert_allclose(push.numpy(), best, atol=2e-3)
        end += len(columns)
    assert end == 96


@given(width=st.integers(1, 80), count=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_blocks_are_of_every_column_once(width: int, count: int) -> None:
    assert sorted(order_of(runs(width, count), width).tolist()) == list(range(width))
    some = interleaved(width, count)
    assert bool(some) == (width % count == 0)
    assert not some or sorted(order_of(some, width).tolist()) == list(range(width))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(300, 288), (40, 96), (37, 1056), (9, 32)])
def test_inputs_that_are_alike_in_all_directions_change_nothing(name: str, shape: tuple[int, int]) -> None:
    codec, weight = get_codec(name), weights(*shape)
    _, plain = packed(codec, weight, None)
    _, fed_back = packed(codec, weight, Feedback(3 * torch.eye(shape[1])))
    assert cost(fed_back - weight, torch.eye(shape[1])) < 1.03 * cost(plain - weight, torch.eye(shape[1]))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(900, 288), (200, 1056), (64, 1536)])
def test_what_is_lost_with_feedback_is_what_was_predicted(name: str, shape: tuple[int, int]) -> None:
    codec, weight, width = get_codec(name), weights(*shape), shape[1]
    known, truth = moments(8 * width, width, seed=1), moments(8 * width, width, seed=2)
    buffers, plain = packed(codec, weight, None)
    same, fed_back = packed(codec, weight, Feedback(known))
    left = expected(moments(4 * width, width, seed=3), moments(4 * width, width, seed=4), codec.feedback(width))
    assert {key: part.shape for key, part in same.items()} == {key: part.shape for key, part in buffers.items()}
    assert left.loss < 0.4
    assert cost(fed_back - weight, truth) / cost(plain - weight, truth) == pytest.approx(left.loss, rel=0.15)
    noise = cost(fed_back - weight, torch.eye(width)) / cost(plain - weight, torch.eye(width))
    assert noise == pytest.approx(left.noise, rel=0.15)


def test_moments_of_few_tokens_promise_less_than_they_say_of_themselves() -> None:
    width, blocks = 256, interleaved(256, 32)
    first, second = moments(128, width, seed=1), moments(128, width, seed=2)
    flattering, promised = Feedback(first + second).left(blocks).loss, expected(first, second, blocks).loss
    true = Feedback(first + second).left(blocks, Feedback(moments(20_000, width, seed=3))).loss
    assert flattering < 0.85 * true
    assert promised == pytest.approx(true, rel=0.15)


def test_a_matrix_that_is_looked_up_as_well_keeps_that_part_of_its_loss() -> None:
    width, blocks = 256, interleaved(256, 32)
    first, second = moments(4 * width, width, seed=1), moments(4 * width, width, seed=2)
    left = expected(first, second, blocks, 3 * moments(100, width, seed=3))
    others = expected(first, second, blocks)
    assert left.loss == pytest.approx(others.loss, rel=0.15)
    assert left.noise == others.noise > 1
    assert left.alpha is not None
    assert left.share_of(left.alpha) == left.share_of(left.alpha / 2) == left.loss
    assert left.share_of(4 * left.alpha) == pytest.approx(0.25 * left.loss + 0.75 * left.noise)
    assert others.share_of(1.0) == others.loss


@pytest.mark.parametrize("name", ["trellis-s64-r3.0000", "higgs-p2-n64"])
@pytest.mark.parametrize("of", ["nothing", "dead columns", "one token", "one direction"])
def test_moments_that_have_no_inverse(name: str, of: str) -> None:
    x = inputs(500, 128)
    if of == "nothing":
        x = torch.zeros(4, 128)
    elif of == "dead columns":
        x[:, ::3] = 0
    elif of == "one token":
        x = x[:1] * 1e4
    else:
        x = x[:, :1] * torch.ones(1, 128)
    weight = weights(64, 128)
    weight[7] = 0
    _, plain = packed(get_codec(name), weight, None)
    _, fed_back = packed(get_codec(name), weight, Feedback(x.T @ x))
    assert bool(fed_back.isfinite().all())
    assert cost(fed_back - weight, x.T @ x) <= cost(plain - weight, x.T @ x)
    assert float(fed_back[7].abs().max()) < 1e-6


@pytest.mark.parametrize(
    "name", ["higgs-p1-n16", "higgs-p2-n64", "higgs-p3-n64", "higgs-p4-n256", "trellis-s8-r3.0000"]
)
def test_errors_are_fed_back_between_blocks_of_whole_vectors(name: str) -> None:
    codec = get_codec(name)
    for width in (96, 2048, 11008):
        blocks = codec.feedback(width)
        assert sorted(column for block in blocks for column in range(*block.indices(width))) == list(range(width))
        assert not isinstance(codec, Higgs) or all(block.start % codec.p == 0 for block in blocks)


def test_moments_are_those_of_rotated_inputs() -> None:
    x = inputs(50, 96)
    torch.testing.assert_close(Feedback(x.T @ x).moments, rotate(x).T @ rotate(x), rtol=1e-4, atol=1e-2)


def test_moments_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(WaterfillError, match="moments of a matrix's inputs are not finite; calibrate on another text"):
        Feedback(torch.full((4, 4), torch.nan))


@pytest.mark.parametrize(("name", "width"), [("levels-8", 128), ("trellis-s64-r3.0000", 100)])
def test_moments_change_nothing_where_there_are_no_blocks_of_columns(name: str, width: int) -> None:
    codec, weight = get_codec(name), weights(40, width)
    plain, same = (packed(codec, weight, feedback)[0] for feedback in (None, Feedback(moments(200, width))))
    assert all(torch.equal(same[key], part) for key, part in plain.items())


def test_who_has_no_blocks_of_columns_has_no_feedback() -> None:
    assert get_codec("levels-8").feedback(128) == ()
    assert get_codec("trellis-s64-r3.0000").feedback(100) == ()


@pytest.mark.parametrize("name", ["trellis-s64-r0.7000", "trellis-s64-r1.5000", "higgs-p2-n16", "higgs-p1-n2"])
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_feedback_gains_at_low_rates_too(name: str, rho: float) -> None:
    codec, weight, width = get_codec(name), weights(256, 288), 288
    truth, known = moments(8 * width, width, seed=2), Feedback(moments(8 * width, width, seed=1))
    lost = []
    for feedback in (None, known):
        _, decoded = packed(codec, weight, feedback, rho)
        lost.append(cost(decoded - weight, truth))
    assert lost[1] < 0.9 * lost[0]


def test_damping_grows_with_noise() -> None:
    feedback, blocks = Feedback(moments(400, 128, seed=1)), interleaved(128, 32)
    norms = [
        float(torch.linalg.vector_norm(torch.cat([p.flatten() for p in feedback.pushes(blocks, t2)])))
        for t2 in (0.0, 0.01, 0.1, 0.3, 0.9)
    ]
    assert norms[0] == norms[1] > norms[2] > norms[3] > norms[4]
