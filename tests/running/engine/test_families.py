"""Gemma 3 through the engine against transformers with the same packed weights: the proof that a family is a file.

Its layers have what those of the Llama kind do not: norms behind attention and feed-forward, GELU, windows, two tables
of rotary positions. Logits are compared as in test_engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

import waterfill
from tests.running.engine.test_engine import distance, expected, ids, streamed
from tests.support import streams
from tests.support.plans import plan_for
from waterfill.base import native
from waterfill.base.errors import UnsupportedError
from waterfill.planning.budget import Budget
from waterfill.running.engine.families.llama_spec import rounded
from waterfill.running.engine.opening import open_model

pytestmark = [
    pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off"),
    pytest.mark.usefixtures("no_reader_left"),
]

LIBRARY = native.library()
ISAS = [] if LIBRARY is None else list(LIBRARY.isas)
TOLERANCE = 0.01  # of the spread of the logits: six bits and float32 differ less than in test_engine
WINDOW = 8
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 92,
    "intermediate_size": 171,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 38,
    "query_pre_attn_scalar": 30,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
ROTARY = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An artifact of a random Gemma 3, made when first asked for."""
    root = tmp_path_factory.mktemp("gemma")

    def make(dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
        name = f"{dtype}-{len(fields)}-{'-'.join(fields)}"
        if not (root / name).exists():
            config = transformers.Gemma3TextConfig(**{**SHAPE, "rope_parameters": ROTARY, **fields})
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))  # norms that matter
            model.to(dtype).save_pretrained(root / f"{name}-model")
            plan = plan_for(
                root / f"{name}-model", codecs=["trellis-s8-r6.0000"], budget=Budget(bits=16.0), uniform=True
            )
            waterfill.pack(root / f"{name}-model", root / name, plan=plan)
        return root / name

    return make


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of the machine's instruction sets, in use."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    native.isa.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.isa.cache_clear()


def test_logits_are_those_of_transformers(made: Made) -> None:
    found, wanted = open_model(made()).sequence().forward(ids(), logits=40), expected(made(), ids())
    assert distance(found, wanted) < TOLERANCE
    assert distance(found[:, ::-1], wanted) > 10 * TOLERANCE  # the measure tells models apart


CHANGES: dict[str, dict[str, Any]] = {
    "all see all": {"layer_types": ["full_attention"] * 5},
    "another window": {"sliding_window": 12},
    "another local base": {"rope_parameters": {**ROTARY, "sliding_attention": {"rope_theta": 9000.0}}},
    "another base": {"rope_parameters": {**ROTARY, "full_attention": {"rope_theta": 9000.0}}},
    "another scale of scores": {"query_pre_attn_scalar": 90},
}


@pytest.mark.parametrize("fields", CHANGES.values(), ids=CHANGES)
def test_every_part_of_attention_counts(made: Made, fields: dict[str, Any]) -> None:
    """Each changes the logits, and to what transformers makes of it."""
    path = made(**fields)
    found = open_model(path).sequence().forward(ids(), logits=40)
    assert distance(found, expected(path, ids())) < TOLERANCE
    assert distance(found, open_model(made()).sequence().forward(ids(), logits=40)) > 5 * TOLERANCE


def test_a_checkpoint_of_half_precision(made: Made) -> None:
    """With the scale of its embeddings in that precision, as transformers has it."""
    path = made(torch.bfloat16)
    model = open_model(path)
    assert model.spec.rounded_scale == torch.tensor(92**0.5).to(torch.bfloat16).item() != np.float32(92**0.5)
    assert distance(model.sequence().forward(ids(), logits=40), expected(path, ids())) < TOLERANCE


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    numbers = [*np.random.default_rng(0).uniform(1, 100, 200).tolist(), 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    for name, dtype in {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.items():
        for number in numbers:
            assert rounded(number, name) == torch.tensor(number, dtype=torch.float32).to(dtype).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_may_come_in_pieces_of_any_size(made: Made, dtype: torch.dtype) -> None:
    """Windows begin anywhere in what attention reads at once."""
    path, tokens = made(dtype), ids(60)
    whole = open_model(path).sequence().forward(tokens, logits=60)
    sequence = open_model(path).sequence()
    steps = [sequence.forward(tokens[:7], logits=7), *(sequence.forward([token]) for token in tokens[7:])]
    assert np.array_equal(np.concatenate(steps), whole)
    model = open_model(path)
    model._pass_tokens = 13
    assert np.array_equal(model.sequence().forward(tokens, logits=60), whole)


@pytest.mark.parametrize("keep", [streams.nothing, streams.mixed], ids=lambda keep: keep.__name__)
def test_streamed_logits_are_those_of_the_resident_model(made: Made, keep: streams.Keep) -> None:
    resident, model = open_model(made()).sequence(), streamed(made(), keep)
    sequence = model.sequence()
    assert np.array_equal(resident.forward(ids(), logits=40), sequence.forward(ids(), logits=40))
    assert np.array_equal(resident.forward([1]), sequence.forward([1]))
    assert model.streaming is not None
    model.streaming.close()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_pass_over_several_is_one_over_each(made: Made, isa: str) -> None:
    model = open_model(made())
    prompts = [ids(30), ids(5), ids(17)]
    together, alone = ([model.sequence() for _ in prompts] for _ in range(2))
    for new, logits in ((prompts, 3), ([[5], [6], [7]], 1), ([ids(9), [1], ids(12)], 1)):
        found = model.forward(together, new, logits)
        for rows, sequence, tokens in zip(found, alone, new, strict=True):
            assert np.array_equal(rows, sequence.forward(tokens, logits))


def test_every_instruction_set_gives_the_same_bits(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[npt.NDArray[np.float32]] = []
    for isa in ISAS:
        monkeypatch.setenv(native.ISA_VARIABLE, isa)
        native.isa.cache_clear()
        found.append(open_model(made()).sequence().forward(ids(), logits=40))
    native.isa.cache_clear()
    assert all(np.array_equal(one, found[0]) for one in found[1:])


def test_greedy_text_is_that_of_transformers(made: Made) -> None:
    path, tokens = made(), ids(20)
    model = waterfill.load(path, dtype=torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(torch.tensor([tokens]), **options)[0, 20:].tolist()
    sequence, found = open_model(path).sequence(), list[int]()
    logits = sequence.forward(tokens)
    for _ in range(24):
        found.append(int(logits[-1].argmax()))
        logits = sequence.forward(found[-1:])
    assert found == wanted


@pytest.mark.parametrize("name", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_capped_logits_are_refused_in_words(made: Made, name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"its {name} is 30\.0"):
        open_model(made(**{name: 30.0}))
