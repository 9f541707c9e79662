"""What a model's generation_config.json may say, as far as types go: checked before its weights are read.

Ranges are transformers' own business, since many options count only together with others. It says nothing of a text
where a number belongs, or says it in the middle of a generation and in terms of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from waterfill.base.errors import WaterfillError

FILE = "generation_config.json"
MOST_BYTES = 1 << 20

_FLAGS = (
    *("do_sample", "is_assistant", "low_memory", "output_attentions", "output_hidden_states", "output_logits"),
    *("output_scores", "remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "token_healing"),
    *("use_cache", "use_mtp"),
)
_WHOLE = (
    *("encoder_no_repeat_ngram_size", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("no_repeat_ngram_size", "num_assistant_tokens", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("prefill_chunk_size", "prompt_lookup_num_tokens", "top_k"),
)
_NUMBERS = (
    *("diversity_penalty", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "guidance_scale"),
    *("length_penalty", "max_time", "min_p", "penalty_alpha", "repetition_penalty", "temperature", "top_h", "top_p"),
    "typical_p",
)
_TOKENS = (
    *("begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "pad_token_id", "suppress_tokens"),
)
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")


def check_choices(path: Path, vocabulary: int | None) -> None:
    """Refuse a generation_config.json, in the directory of a model, that is no JSON object, has values of other types
    than its options take, or forces tokens that the vocabulary does not have.

    Raises:
        WaterfillError: it is one of these; names the field.
    """
    file = path / FILE
    if not file.exists():
        return
    try:
        if file.stat().st_size > MOST_BYTES:
            raise WaterfillError(f"{file} is larger than {MOST_BYTES} bytes; give the one that came with the model")
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WaterfillError(f"{file} cannot be read as JSON ({error}); repair or remove it") from error
    if not isinstance(settings, dict):
        raise WaterfillError(f"{file} holds no JSON object; repair or remove it")
    for name, value in settings.items():
        expected, holds = _EXPECTED.get(name, ("", _any))
        if value is not None and not holds(value):
            raise WaterfillError(f"{file} sets {name} to {_quoted(value)}: expected {expected}; change or remove it")
        if name in _FORCED and vocabulary is not None and max(_listed(value), default=0) >= vocabulary:
            raise WaterfillError(
                f"{file} sets {name} to {_quoted(value)}, but the model knows {vocabulary} tokens; change or remove it"
            )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _quoted(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _any(value: Any) -> bool:
    return True


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_tokens(value: Any) -> bool:
    return all(type(token) is int for token in _listed(value))


def _is_texts(value: Any) -> bool:
    return all(isinstance(text, str) and text for text in _listed(value))


_EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_FLAGS, ("true or false", _is_flag)),
    **dict.fromkeys(_WHOLE, ("a whole number", _is_whole)),
    **dict.fromkeys(_NUMBERS, ("a number", _is_number)),
    **dict.fromkeys(_TOKENS, ("the id of a token, or a list of them", _is_tokens)),
    "stop_strings": ("a text, or a list of them", _is_texts),
}
