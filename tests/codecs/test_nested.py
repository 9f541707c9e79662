"""Nested trellises: every level is the trellis of its bytes, and the buffers of one are the first of the next."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.support.codec_samples import relative_noise
from waterfill.base.errors import ArtifactError, WaterfillError
from waterfill.codecs import Encoded, Nested, get_codec
from waterfill.codecs.contract import layout_bytes
from waterfill.codecs.feedback import Feedback
from waterfill.codecs.hadamard import rotate
from waterfill.codecs.nested.codec import EARLY_NOISE, nested
from waterfill.codecs.trellis.curves import curve
from waterfill.codecs.whole import encode_whole

LADDER = "nested-s8-r2.0000-3.0000-4.5000"
SHAPES = [(5, 72), (12, 256), (1100, 240), (3, 1600)]  # of one stream and of several, of one group and of two


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoded(codec: Nested, weight: torch.Tensor, feedback: Feedback | None = None, rho: float = 1.0) -> Encoded:
    return encode_whole(codec, weight, rho=rho, feedback=feedback)


def at(level: int, whole: Encoded, codec: Nested) -> Encoded:
    """The buffers of a lower level."""
    keys = codec.at(level).layout(whole.shape)
    return Encoded(whole.shape, {key: whole.buffers[key] for key in keys}, whole.exponent, 0.0, 0.0)


def arrays(buffers: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: data.view(torch.uint8).numpy() for key, data in buffers.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_level_is_read_from_the_first_buffers_and_takes_what_it_says(shape: tuple[int, int]) -> None:
    codec, weight = nested(LADDER), gaussian(*shape)
    whole = encoded(codec, weight)
    noise = []
    for level, rate in enumerate(codec.ladder, 1):
        lower = codec.at(level)
        keys = list(lower.layout(shape))
        assert keys == list(codec.layout(shape))[: len(keys)]
        size = layout_bytes(lower.layout(shape))
        assert size == lower.menu_point(shape).size_bytes == sum(whole.buffers[key].nbytes for key in keys)
        if math.prod(shape) > 100_000:
            assert size * 8 / math.prod(shape) == pytest.approx(rate, abs=0.01)
        noise.append(relative_noise(lower.decode(at(level, whole, codec)), weight))
    assert noise == sorted(noise, reverse=True)
    assert len(set(noise)) == 3
    assert noise[-1] == pytest.approx(whole.noise_power / whole.power, rel=1e-4)


def test_distortions_are_those_that_are_claimed() -> None:
    codec, weight = nested("nested-s64-r2.0000-3.0000-4.5000"), gaussian(1024, 512)
    whole = encoded(codec, weight)
    for level, claimed in enumerate(codec.distortions(whole.shape), 1):
        lower = codec.at(level)
        assert relative_noise(lower.decode(at(level, whole, codec)), weight) == pytest.approx(claimed, rel=0.05)
        alone = curve(64).t2(codec.ladder[level - 1])
        assert claimed < 1.25 * alone, "stages add up to little more than one trellis of all their bits"


def test_the_first_level_is_the_trellis_of_its_bytes() -> None:
    weight = gaussian(600, 256)
    codec = nested("nested-s8-r2.5000-4.0000")
    first = codec.at(1).decode(at(1, encoded(codec, weight), codec))
    trellis = get_codec("trellis-s8-r2.5000")
    alone = trellis.decode(trellis.encode(weight))
    assert relative_noise(first, weight) == pytest.approx(relative_noise(alone, weight), rel=0.01)


def test_equal_rates_have_one_stage() -> None:
    shape, weight = (40, 320), gaussian(40, 320)
    codec = nested("nested-s8-r2.0000-2.0000-3.5000")
    assert [*codec.layout(shape)] == ["streams1", "gains1", "streams3", "gains3"]
    whole = encoded(codec, weight)
    both = [codec.at(level).decode(at(level, whole, codec)) for level in (1, 2)]
    assert torch.equal(*both)
    assert codec.distortions(shape)[0] == codec.distortions(shape)[1] > codec.distortions(shape)[2]


def test_a_level_is_unbiased_where_that_is_asked_for() -> None:
    weight = gaussian(512, 256)
    codec = nested(LADDER)
    whole = encoded(codec, weight, rho=0.0)
    for level in (1, 2, 3):
        decoded = codec.at(level).decode(at(level, whole, codec))
        assert float((decoded * weight).sum() / weight.square().sum()) == pytest.approx(1.0, abs=2e-3)


def test_feedback_lowers_what_products_lose_at_every_level() -> None:
    codec, weight = nested("nested-s8-r2.0000-3.0000-4.5000"), gaussian(512, 256)
    x = gaussian(4096, 256, seed=1) @ torch.diag(torch.logspace(0, -2, 256)) @ gaussian(256, 256, seed=2)
    feedback = Feedback(x.T @ x / len(x))
    plain, fed_back = encoded(codec, weight), encoded(codec, weight, feedback)
    left = feedback.left(codec.feedback(256)), feedback.left(codec.feedback(256), t2=EARLY_NOISE)
    claimed = codec.distortions(weight.shape, (left[1].noise, left[0].noise))  # type: ignore[arg-type]
    for level in (1, 2, 3):
        lower = codec.at(level)
        losses = [
            feedback.cost(rotate(lower.decode(at(level, some, codec)) - weight)) / feedback.cost(rotate(weight))
            for some in (plain, fed_back)
        ]
        assert losses[1] < 0.8 * losses[0]
        share = left[0].loss if level == 3 else left[1].loss
        assert losses[1] == pytest.approx(claimed[level - 1] * share, rel=0.25)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    codec, weight = nested(LADDER), gaussian(*shape)
    whole = encoded(codec, weight)
    decoded = codec.restored(whole.buffers, shape)
    step = codec.parts(shape, 0).rows
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        some = codec.rows(arrays(whole.buffers), shape, first, last)
        buffers = {key: torch.from_numpy(data).view(whole.buffers[key].dtype) for key, data in some.items()}
        assert torch.equal(codec.restored(buffers, (last - first, shape[1])), decoded[first:last])


def test_in_memory_little_is_lost_beside_what_a_level_lost() -> None:
    codec, weight = nested("nested-s8-r2.0000-3.0000-4.5000"), gaussian(256, 512)
    whole = encoded(codec, weight)
    for level in (1, 2, 3):
        lower, buffers = codec.at(level), at(level, whole, codec).buffers
        memory = lower.to_memory(buffers, whole.shape, 0)
        exact = lower.restored(buffers, whole.shape)
        found = lower.memory.decode_rotated(memory["codes"], memory["scales"], 0, 512)
        assert relative_noise(found, exact) < 0.02 * lower.distortion(whole.shape)


def test_what_is_damaged_is_refused() -> None:
    codec, weight = nested(LADDER), gaussian(40, 128)
    whole = encoded(codec, weight)
    for key, value in (("gains3", float("inf")), ("gains3", float("nan"))):
        damaged = {**whole.buffers, key: torch.full_like(whole.buffers[key], value)}
        with pytest.raises(ArtifactError, match="gain"):
            codec.to_memory(damaged, whole.shape, 0)
    cut = whole.buffers["streams2"].clone()
    cut[-200:] = 255
    with pytest.raises(ArtifactError, match="damaged"):
        codec.to_memory({**whole.buffers, "streams2": cut}, whole.shape, 0)
    with pytest.raises(ArtifactError, match="infinite"):
        codec.to_memory(_with_large_units(whole.buffers), whole.shape, 0)


def _with_large_units(buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The unit of stage 1 (behind the index of one stream, and four bytes of its head) and the gain as large as numbers
    may be."""
    streams = buffers["streams1"].clone()
    streams[4 + 4 : 4 + 8] = torch.from_numpy(np.array([30000.0], "<f4").view(np.uint8).copy())
    return {**buffers, "streams1": streams, "gains3": torch.full_like(buffers["gains3"], 65504.0)}


@pytest.mark.parametrize(
    "name",
    [
        "nested-s8-r2.0",
        "nested-s7-r2.0000-3.0000",
        "nested-s8-r3.0000-2.0000",
        "nested-s8-r2.0000-2.1000",
        "nested-s8-r0.1000-2.0000",
        "nested-s8-r2.0000-9.5000",
        "nested-s8-r" + "-".join(f"{rate}.0000" for rate in range(1, 10)),
        "nested-s8-r2.0000-",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(WaterfillError, match="is not a nested codec"):
        get_codec(name)
