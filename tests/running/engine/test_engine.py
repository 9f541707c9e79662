"""The engine's models against transformers' with the same packed weights; in memory, streamed, and what is refused.

Both multiply the same integers; sums of floats are in another order, and where that moves an activation across a
rounding boundary, it moves by one step of 127. So logits are compared within a few per cent of their spread.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import waterfill
from tests.support import models, streams
from tests.support.plans import plan_for
from waterfill.base import native, process
from waterfill.base.errors import ArtifactError, MemoryLimitError, UnsupportedError, WaterfillError
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.engine.families.llama_spec import read_spec
from waterfill.running.engine.opening import open_model
from waterfill.running.engine.weights import Streamed
from waterfill.running.streaming.limit import Working

pytestmark = [
    pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off"),
    pytest.mark.usefixtures("no_reader_left"),
]

CODECS = ("trellis-s8-r3.0000", "trellis-s4-r6.0000", "higgs-p1-n6", "higgs-p2-n16")
KEEPS = (streams.nothing, streams.coded, streams.decoded, streams.mixed)
TOLERANCE = 0.05  # of the logits' standard deviation, on average

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama, tied": lambda: transformers.LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "llama, biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "llama 3.1": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama, linear": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**{**SHAPE, "num_key_value_heads": 1}, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=40),
}
Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """An artifact of a random model in one codec, made when first asked for."""
    root = tmp_path_factory.mktemp("engine")

    def pack(kind: str = "llama", codec: str = CODECS[0], dtype: torch.dtype = torch.float32) -> Path:
        out = root / f"{kind}-{codec}-{dtype}"
        if not out.exists():
            checkpoint = root / f"{kind}-{dtype}"
            if not checkpoint.exists():
                torch.manual_seed(0)
                model = transformers.AutoModelForCausalLM.from_config(KINDS[kind](), dtype=torch.float32)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases that matter
                model.to(dtype).save_pretrained(checkpoint)
            plan = plan_for(checkpoint, codecs=[codec], budget=Budget(bits=16.0), uniform=True)
            waterfill.pack(checkpoint, out, plan=plan)
        return out

    return pack


def ids(count: int = 40) -> list[int]:
    return np.random.default_rng(count).integers(0, 97, count).tolist()  # type: ignore[no-any-return]


def streamed(path: Path, keep: streams.Keep = streams.nothing) -> LlamaModel:
    memory = process.resident_bytes() + 200_000_000
    return open_model(path, memory=memory, streamed=True, tuning=streams.quick(keep))


@torch.inference_mode()
def expected(path: Path, tokens: list[int], **options: Any) -> npt.NDArray[np.float32]:
    logits: torch.Tensor = waterfill.load(path, dtype=torch.float32, **options)(torch.tensor([tokens])).logits[0]
    return logits.float().numpy()


def distance(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    """Root mean square of the difference, over the spread of what is wanted."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(packed: Packed, kind: str) -> None:
    path = packed(kind)
    found = open_model(path).sequence().forward(ids(), logits=40)
    wanted = expected(path, ids())
    assert found.shape == wanted.shape
    assert distance(found, wanted) < TOLERANCE
    assert distance(found[:, ::-1], wanted) > 10 * TOLERANCE  # the measure tells models apart


OLDER: dict[str, dict[str, Any]] = {
    "older names": {"rope_parameters": None, "rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "both names, alike": {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
    "a base beside": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 1e6},
}


@pytest.mark.parametrize("change", OLDER.values(), ids=OLDER)
def test_logits_are_those_of_transformers_with_fields_of_older_configs(
    packed: Packed, tmp_path: Path, change: dict[str, Any]
) -> None:
    copy = _with_config(packed(), tmp_path / "copy", change)
    found = open_model(copy, verify=False).sequence().forward(ids(), logits=40)
    wanted = expected(copy, ids(), verify=False)
    assert distance(found, wanted) < TOLERANCE
    assert distance(expected(packed(), ids()), wanted) > 4 * TOLERANCE  # the change matters


def _with_config(path: Path, copy: Path, change: dict[str, Any]) -> Path:
    """An artifact with other fields in its config.json."""
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | change))
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_half_precision(packed: Packed, dtype: torch.dtype) -> None:
    path = packed("qwen2", dtype=dtype)
    assert distance(open_model(path).sequence().forward(ids(), logits=40), expected(path, ids())) < TOLERANCE


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("keep", KEEPS, ids=lambda keep: keep.__name__)
def test_streamed_logits_are_those_of_the_resident_model(packed: Packed, codec: str, keep: streams.Keep) -> None:
    resident, model = open_model(packed(codec=codec)).sequence(), streamed(packed(codec=codec), keep)
    assert model.streaming is not None
    sequence = model.sequence()
    assert np.array_equal(resident.forward(ids(), logits=40), sequence.forward(ids(), logits=40))
    assert np.array_equal(resident.forward([1]), sequence.forward([1]))
    model.streaming.close()


def test_a_text_may_come_in_pieces_of_any_size(packed: Packed) -> None:
    """Also beyond the first capacity of the cache."""
    path, tokens = packed("qwen3", dtype=torch.bfloat16), ids(120)
    whole = open_model(path).sequence().forward(tokens, logits=120)
    model = open_model(path).sequence()
    model.cache.capacity = 0  # type: ignore[attr-defined]  # begin with room for nothing
    steps = np.concatenate([model.forward(tokens[:7], logits=7), *(model.forward([token]) for token in tokens[7:])])
    assert np.array_equal(steps, whole)
    narrow = open_model(path)
    narrow._pass_tokens = 16
    sequence = narrow.sequence()
    assert np.array_equal(sequence.forward(tokens, logits=50), whole[-50:])
    assert sequence.ids == tokens


def test_what_is_truncated_is_forgotten(packed: Packed) -> None:
    sequence, fresh = open_model(packed()).sequence(), open_model(packed()).sequence()
    sequence.forward(ids(20))
    sequence.truncate(5)
    assert len(sequence.ids) == sequence.cache.length == 5
    assert np.array_equal(sequence.forward([3, 4], logits=2), fresh.forward([*ids(20)[:5], 3, 4], logits=2))


def test_what_cannot_be_forwarded_leaves_the_cache_as_it_was(packed: Packed) -> None:
    sequence = open_model(packed()).sequence()
    first = sequence.forward([1, 2])
    with pytest.raises(WaterfillError, match=r"130 tokens are more than the 128 positions .* shorten"):
        sequence.forward([0] * 128)
    with pytest.raises(IndexError, match="97 is none of the model's 97 tokens"):
        sequence.forward([5, 97])
    assert len(sequence.ids) == sequence.cache.length == 2
    sequence.truncate(0)
    assert np.array_equal(sequence.forward([1, 2]), first)


def test_rotary_frequencies_are_those_of_transformers(packed: Packed) -> None:
    for kind, scheme in {"llama 3.1": "llama3", "llama, linear": "linear"}.items():
        wanted, factor = ROPE_INIT_FUNCTIONS[scheme](KINDS[kind](), "cpu")
        assert factor == 1.0
        spec = read_spec(open_artifact(packed(kind), verify=False))
        np.testing.assert_allclose(spec.frequencies, wanted.numpy()[None], rtol=3e-7)
        cosine, sine = spec.rotary(np.arange(3, 5))
        angle = 4 * wanted.numpy().astype(np.float64)
        np.testing.assert_allclose(cosine[0, 1], np.cos(np.tile(angle, 2)), atol=1e-6)
        np.testing.assert_allclose(sine[0, 1], np.sin(np.tile(angle, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma"}, "its kind is 'gemma'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": 64}, "sliding_window is 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attend to everything"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"num_hidden_layers": 2}, r"tensor model\.layers\.2\."),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_attention_heads": 5}, "5 heads do not share 2 heads of keys"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"head_dim": 23}, "head_dim is 23"),
    ],
)
def test_other_models_are_refused_in_words(packed: Packed, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        open_model(_with_config(packed(), tmp_path / "copy", change), verify=False)


def test_a_matrix_that_was_kept_is_refused(tmp_path: Path) -> None:
    checkpoint = models.tiny_llama(tmp_path / "model")
    waterfill.pack(checkpoint, tmp_path / "out", bits=6, uniform=True, keep=["lm_head"], sequences=2, length=16)
    with pytest.raises(UnsupportedError, match="lm_head was kept as it is"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize("place", [-1, -2])
def test_damage_is_found_and_the_model_can_go_on(packed: Packed, place: int) -> None:
    """In the head, or in a layer, whose exception comes through the library's call of a callback. The next pass starts
    afresh."""
    model = streamed(packed())
    assert model.streaming is not None
    sequence = model.sequence()
    before = sequence.forward([1, 2, 3])
    matrix = model.streaming.sequence[place]  # not yet read ahead for the next pass
    sums = matrix.sums
    sums ^= np.uint64(1)
    with pytest.raises(ArtifactError, match=rf"{matrix.name}.* is not what it was"):
        sequence.forward([4])
    assert sequence.ids == [1, 2, 3]
    sums ^= np.uint64(1)
    sequence.truncate(0)
    assert np.array_equal(sequence.forward([1, 2, 3]), before)
    model.streaming.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_as_the_library_calls_back(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the callback's first line can catch it: the pass ends, and is not taken for whole."""
    multiply, calls = Streamed._multiply, list[int]()

    def interrupted(self: Streamed, *given: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        multiply(self, *given)

    monkeypatch.setattr(Streamed, "_multiply", interrupted)
    model = streamed(packed())
    sequence = model.sequence()
    with pytest.raises(KeyboardInterrupt):
        sequence.forward([1, 2, 3])
    assert sequence.ids == []
    assert np.array_equal(sequence.forward([1, 2, 3]), open_model(packed()).sequence().forward([1, 2, 3]))
    assert model.streaming is not None
    model.streaming.close()


@pytest.mark.parametrize("memory", [None, "8GB"])
def test_digests_are_compared(packed: Packed, tmp_path: Path, memory: str | None) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed().iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = copy / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="digest"):
        open_model(copy, memory=memory, streamed=memory is not None)


def test_too_little_memory_says_how_much_is_needed(packed: Packed) -> None:
    tuning = streams.quick()
    with pytest.raises(MemoryLimitError, match=r"1 MB are too little .* streamed, it takes \d+ MB at least") as raised:
        open_model(packed(), memory="1MB", tuning=tuning)
    model = open_model(packed(), memory=raised.value.smallest_bytes + 8_000_000, streamed=True, tuning=tuning)
    assert model.sequence().forward(ids()).shape == (1, 97)
    assert model.streaming is not None
    model.streaming.close()


def test_kept_weights_make_room_for_long_prompts_and_come_back(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = streamed(packed(), streams.mixed), ids(100)
    streaming, sequence = model.streaming, model.sequence()
    assert streaming is not None
    kept, before = streaming.summary().kept_bytes, sequence.forward(tokens, logits=3)
    taken = streaming.limit_bytes - kept // 2
    each = kept // 100  # so that a hundred tokens take half of what is kept
    monkeypatch.setattr(process, "resident_bytes", lambda: taken)
    assert model._limit is not None
    monkeypatch.setattr(model._limit, "working", Working(token=0, activations=each, logits=0))
    seen = []
    monkeypatch.setattr(streaming, "products", _noting(streaming, seen))
    sequence.truncate(0)
    assert np.array_equal(sequence.forward(tokens, logits=3), before)
    assert 0 < min(seen) < kept
    sequence.truncate(99)
    assert np.array_equal(sequence.forward(tokens[99:]), before[-1:])
    assert streaming.summary().kept_bytes == kept
    streaming.close()


def _noting(streaming: Any, seen: list[int]) -> Callable[..., None]:
    products = streaming.products

    def noted(*given: Any) -> None:
        seen.append(streaming.summary().kept_bytes)
        products(*given)

    return noted


def test_neither_torch_nor_transformers_is_imported(packed: Packed) -> None:
    script = (
        "import sys; from waterfill.running.engine.opening import open_model\n"
        "one = open_model(sys.argv[1]); two = open_model(sys.argv[1], memory='4GB', streamed=True)\n"
        "assert (one.sequence().forward([1, 2, 3]) == two.sequence().forward([1, 2, 3])).all()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(packed())], timeout=120)
    assert done.returncode == 0
