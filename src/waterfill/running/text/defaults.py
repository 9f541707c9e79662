"""How a model wants its tokens chosen: generation_config.json, merged with what the user says.

transformers gives every option the first value of three: the argument of `generate`, generation_config.json, its own
default. The arguments are `Sampling.arguments`, the same for both runners, so that both choose alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from waterfill.base.errors import UnsupportedError
from waterfill.base.reading import read_text
from waterfill.running.text.next_token import Rules
from waterfill.running.text.sampling import Sampling

GENERATION_FILE, CONFIG_FILE = "generation_config.json", "config.json"

# transformers' `GenerationConfig._get_default_generation_params`, for the options that the engine has.
_LIBRARY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
}

# Options that the engine does not have, with the value besides null that does nothing.
_OFF: dict[str, Any] = {
    "assistant_early_exit": None,
    "assistant_ensemble_weight": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "speculation_type": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "use_mtp": False,
    "watermarking_config": None,
}

# Options without an effect on which tokens come: lengths that `max_new_tokens` replaces, beams that are not there,
# how to run transformers' models, what to return, and how to draft.
_HARMLESS = frozenset(
    [
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "renormalize_logits",
        "return_dict_in_generate",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
    ]
)

_MOST = 1 << 40  # of any number: more than any option means, and safe to reckon with
OPTIONS = frozenset([*_LIBRARY, *_OFF, *_HARMLESS, "eos_token_id"])  # of a generation, also in config.json


@dataclass(frozen=True)
class Defaults:
    """A model's own choices.

    `options` are those that generation_config.json sets, under its names; `ends` are the ids that end a text.
    """

    options: dict[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()

    def rules(self, sampling: Sampling) -> Rules:
        """How tokens are chosen when a user asks for `sampling`, its Nones left to the model."""
        options = {**_LIBRARY, **self.options, **sampling.arguments()}
        sample = options.pop("do_sample")
        return Rules(**options) if sample else Rules.greedy(options["repetition_penalty"])


def read_defaults(path: Path) -> Defaults:
    """The choices in the directory of an artifact.

    Without generation_config.json transformers takes them from config.json, and so does this.

    Raises:
        UnsupportedError: options that the engine does not have.
    """
    own = path / GENERATION_FILE
    file = own if own.exists() else path / CONFIG_FILE
    try:
        fields = {name: value for name, value in json.loads(read_text(file)).items() if value is not None}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UnsupportedError(f"{file.name} is not a JSON object that can be read") from error
    for name, value in fields.items():
        if not _covered(name, value, known=file is own):
            raise UnsupportedError(f"{file.name} sets {name} to {json.dumps(value)}")
    ends = _ids(fields.get("eos_token_id", []))
    return Defaults({name: fields[name] for name in _LIBRARY if name in fields}, frozenset(ends))


def _covered(name: str, value: Any, *, known: bool) -> bool:
    """Whether the engine does what an option says; `known`: an option that is not known is not covered either.

    Values that transformers refuses are not covered: it has errors of its own for them.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST
    match name:
        case "eos_token_id":
            return all(type(end) is int for end in _ids(value))
        case "do_sample":
            return isinstance(value, bool)
        case "temperature" | "repetition_penalty":
            return number and value > 0
        case "top_p" | "min_p":
            return number and 0 <= value <= 1
        case "top_k":
            return type(value) is int and value >= 0
        case _ if name in _OFF:
            return bool(value == _OFF[name])
        case _:  # a model's config.json has much else that is no business of a generation
            return name in _HARMLESS or not known


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
