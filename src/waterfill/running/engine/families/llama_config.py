"""What a config.json says of a Llama, a Mistral, a Qwen 2 or a Qwen 3; their layers differ in a few vectors."""

from __future__ import annotations

from waterfill.base.errors import UnsupportedError
from waterfill.running.engine.config import (
    Attention,
    Config,
    Fields,
    check_fields,
    check_head_dim,
    dtype_of,
    expect,
    flag,
    frequencies,
    integer,
    layer_count,
    number,
)

_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")

# Fields that are read below.
_READ = frozenset(
    [
        "architectures",
        "attention_bias",
        "dtype",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "is_encoder_decoder",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_interleaved",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "torch_dtype",
        "use_mrope",
        "use_sliding_window",
        "vocab_size",
    ]
)


def read_config(fields: Fields) -> Config:
    """What a config.json says, checked.

    Raises:
        UnsupportedError: the engine does not run such a model, or cannot be sure of it.
    """
    kind = fields["model_type"]
    check_fields(fields, _READ, f"{kind.capitalize()}ForCausalLM")
    expect(fields, hidden_act={"silu"}, pretraining_tp={None, 1}, mlp_bias={None, False})
    expect(fields, is_encoder_decoder={None, False}, rope_interleaved={None, False}, use_mrope={None, False})
    layers = layer_count(fields)
    _check_windows(fields, kind, layers)
    heads = integer(fields, "num_attention_heads")
    head_dim = _head_dim(fields, kind, heads)
    rotary, rotary_name = _rotary(fields)
    return Config(
        layers=layers,
        hidden=integer(fields, "hidden_size"),
        heads=heads,
        kv_heads=_kv_heads(fields, kind, heads),
        head_dim=head_dim,
        inner=integer(fields, "intermediate_size"),
        vocabulary=integer(fields, "vocab_size"),
        positions=integer(fields, "max_position_embeddings"),
        epsilon=number(fields, "rms_norm_eps"),
        dtype=dtype_of(fields),
        tied=flag(fields, "tie_word_embeddings"),
        scaling=float(head_dim**-0.5),
        attention=(Attention(),) * layers,
        vectors=_vectors(fields, kind),
        frequencies=frequencies(rotary, head_dim, rotary_name)[None],
    )


def _check_windows(fields: Fields, kind: str, layers: int) -> None:
    """Every layer attends to all tokens. A window that is stated also limits the cache, whatever the layers say."""
    if kind.startswith("qwen"):  # which has a window unless this is off, and ignores sliding_window then
        expect(fields, use_sliding_window={None, False})
    elif fields.get("sliding_window") is not None or fields.get("use_sliding_window"):
        raise UnsupportedError(f"its sliding_window is {fields.get('sliding_window')!r}")
    elif kind == "mistral" and "sliding_window" not in fields:
        raise UnsupportedError("its config.json has no sliding_window")
    if kind == "mistral" and "layer_types" in fields:
        raise UnsupportedError("its config.json has layer_types, which models of its kind do not have")
    if fields.get("layer_types") not in (None, ["full_attention"] * layers):
        raise UnsupportedError("some of its layers do not attend to everything, or are not of its layer_types")


def _head_dim(fields: Fields, kind: str, heads: int) -> int:
    if "head_dim" in fields and not (fields["head_dim"] is None and kind in ("llama", "mistral")):
        return check_head_dim(fields["head_dim"])
    if kind == "qwen3":
        raise UnsupportedError("its config.json has no head_dim")
    return check_head_dim(integer(fields, "hidden_size") // heads)


def _kv_heads(fields: Fields, kind: str, heads: int) -> int:
    null_is_heads = kind == "llama" or (kind.startswith("qwen") and "num_key_value_heads" in fields)
    if null_is_heads and fields.get("num_key_value_heads") is None:
        return heads
    return integer(fields, "num_key_value_heads")


def _vectors(fields: Fields, kind: str) -> tuple[str, ...]:
    if kind == "qwen2":
        return _BIASES[:3]
    biases = _BIASES if flag(fields, "attention_bias") and kind != "mistral" else ()
    return ("q_norm", "k_norm", *biases) if kind == "qwen3" else biases


def _rotary(fields: Fields) -> tuple[Fields, str]:
    """The parameters of the rotary positions, under their older name or their newer one, and that name."""
    names = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    if len(names) > 1 and fields["rope_parameters"] != fields["rope_scaling"]:
        raise UnsupportedError("its rope_parameters and its rope_scaling say different things")
    rotary = fields[names[0]] if names else {}
    if not isinstance(rotary, dict):
        raise UnsupportedError(f"its {names[0]} is {rotary!r}")
    beside = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    return {**beside, **rotary}, names[0] if names else "config.json"
