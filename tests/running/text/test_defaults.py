"""What a model's files say of sampling means to the engine what it means to transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from waterfill.running.text.defaults import _HARMLESS, _LIBRARY, _OFF, Defaults, UnsupportedError, read_defaults
from waterfill.running.text.next_token import Rules
from waterfill.running.text.sampling import Sampling


def unsupported(path: Path) -> str | None:
    """Why the engine leaves an artifact to transformers; None if it does not."""
    try:
        read_defaults(path)
    except UnsupportedError as reason:
        return str(reason)
    return None


def write(path: Path, **options: Any) -> Path:
    (path / "generation_config.json").write_text(json.dumps(options))
    return path


class Chooser(GenerationMixin):
    """As much of a model as transformers needs to prepare its generation."""

    main_input_name = "input_ids"

    def __init__(self, path: Path) -> None:
        self.generation_config = GenerationConfig.from_pretrained(path)
        self.config = type("Config", (), {"_get_generation_parameters": dict, "is_encoder_decoder": False})()

    def rules(self, sampling: Sampling) -> tuple[bool, dict[str, Any]]:
        """Whether transformers samples, and the processors that it samples with."""
        found, _ = self._prepare_generation_config(None, **sampling.arguments(), num_beams=1, max_new_tokens=9)
        found._eos_token_tensor = None
        processors = self._get_logits_processor(found, input_ids_seq_length=3)
        names = {
            "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
            "TemperatureLogitsWarper": ("temperature", "temperature"),
            "TopKLogitsWarper": ("top_k", "top_k"),
            "TopPLogitsWarper": ("top_p", "top_p"),
            "MinPLogitsWarper": ("min_p", "min_p"),
        }
        pairs = [names[type(p).__name__] + (p,) for p in processors]
        return bool(found.do_sample), {ours: getattr(p, theirs) for ours, theirs, p in pairs}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "eos_token_id": 0},
        {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05},
        {"do_sample": True, "top_k": 0, "top_p": None, "repetition_penalty": 1.2},
        {"do_sample": False, "num_beams": 1, "typical_p": 1.0, "max_length": 4096, "pad_token_id": 3},
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=0, repetition_penalty=1.5, top_k=3),
        Sampling(temperature=1.3),
        Sampling(top_p=0.5),
        Sampling(top_k=0, top_p=1.0, repetition_penalty=1.0),
    ],
)
def test_rules_are_those_of_transformers(tmp_path: Path, options: dict[str, Any], sampling: Sampling) -> None:
    path = write(tmp_path, **options)
    assert unsupported(path) is None
    sample, processors = Chooser(path).rules(sampling)
    assert read_defaults(path).rules(sampling) == Rules(sample=sample, **processors)


def test_ends_of_texts(tmp_path: Path, ref_llama: Path) -> None:
    assert read_defaults(write(tmp_path, eos_token_id=[5, 7])).ends == {5, 7}
    assert read_defaults(write(tmp_path, eos_token_id=5)).ends == {5}
    assert read_defaults(write(tmp_path, eos_token_id=None)) == Defaults()
    assert read_defaults(ref_llama).ends == {0}


def test_without_a_file_of_its_own_config_json_says_it(tmp_path: Path) -> None:
    assert unsupported(tmp_path) == "config.json is not a JSON object that can be read"
    (tmp_path / "config.json").write_text('{"eos_token_id": 4, "hidden_size": 64, "top_k": 7}')
    assert read_defaults(tmp_path) == Defaults({"top_k": 7}, frozenset({4}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 4, "no_repeat_ngram_size": 2}')
    assert unsupported(tmp_path) == "config.json sets no_repeat_ngram_size to 2"


ACTIVE = {
    "num_beams": 4,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [1],
    "begin_suppress_tokens": [1],
    "bad_words_ids": [[3]],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "guidance_scale": 1.5,
    "min_new_tokens": 3,
    "stop_strings": ["x"],
    "exponential_decay_length_penalty": [3, 1.1],
    "an_option_of_next_year": 1,
    "do_sample": "yes",
    "temperature": 0.0,
    "top_k": -1,
    "top_p": 1.5,
    "repetition_penalty": "high",
    "eos_token_id": ["</s>"],
}


@pytest.mark.parametrize("name", ACTIVE)
def test_what_transformers_has_to_do(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, do_sample=True) if name != "do_sample" else tmp_path
    write(path, **{name: ACTIVE[name]})
    assert unsupported(path) == f"generation_config.json sets {name} to {json.dumps(ACTIVE[name])}"
    with pytest.raises(UnsupportedError, match=f"sets {name} to"):
        read_defaults(path)


def test_a_damaged_file_is_left_to_transformers(tmp_path: Path) -> None:
    for text in ("{", "[1]", "\udcff"):
        (tmp_path / "generation_config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert unsupported(tmp_path) == "generation_config.json is not a JSON object that can be read"


def test_every_option_of_transformers_is_sorted() -> None:
    """One that a later version adds is found here; until then models that set it are left to transformers."""
    known = _LIBRARY.keys() | _OFF.keys() | _HARMLESS | {"eos_token_id"}
    options = {name for name in vars(GenerationConfig()) if name != "_original_object_hash"}
    assert options <= known
    for name, value in GenerationConfig()._get_default_generation_params().items():
        assert name not in _LIBRARY or _LIBRARY[name] == value
        assert value is None or name not in _OFF or _OFF[name] == value
