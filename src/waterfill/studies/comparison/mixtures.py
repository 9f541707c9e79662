"""llama.cpp's mixtures (Q4_K_M and the like): which type each matrix gets is llama.cpp's own decision.

Its rules look at names, layers and head counts, never at weights. So a miniature of the model, the same but for its
widths and all zero, goes through llama.cpp's `llama_model_quantize`; the types are read from what that writes, and the
model's own matrices are quantised in them by ggml.
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from waterfill.evaluation.llamacpp import silence
from waterfill.files.architecture import Matrix, parameters_of
from waterfill.files.artifact import Buffer
from waterfill.planning.estimators import matrix_view
from waterfill.studies.comparison.base import Candidate, Method, Put, Subject, Unavailable, register
from waterfill.studies.comparison.ggml import NAMES, quantise
from waterfill.studies.comparison.peers import library
from waterfill.studies.comparison.stored import file_bytes, kept_buffers

MIXTURES = {
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
}
MODELS = ("llama", "mistral")  # whose matrices have these names in GGUF files
WIDTH = 256  # of the miniature: every type's blocks fit
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_STRING, _U32, _F32, _ARRAY = 8, 4, 6, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's other value types


def run(mixture: str, subject: Subject, put: Put, *, weighted: bool = False) -> Candidate:
    """Every matrix in the type that llama.cpp chooses for it."""
    chosen = chosen_types(mixture, subject)
    moments = subject.moments if weighted else {}
    parameters = parameters_of(subject.model)
    buffers: list[Buffer] = []
    payload = 0
    for matrix in subject.architecture.matrices:
        weight = matrix_view(parameters[matrix.parameter].detach(), matrix).float().contiguous()
        result = quantise(weight, chosen[matrix.name], moments.get(matrix.name))
        put(matrix.name, result.weight)
        payload += result.size_bytes
        buffers += [Buffer(f"{matrix.name}.{key}", b.dtype, b.shape) for key, b in result.buffers.items()]
    weights = sum(math.prod(matrix.shape) for matrix in subject.architecture.matrices)
    kinds = sorted(set(chosen.values()), key=list(chosen.values()).count, reverse=True)
    return Candidate(
        size_bytes=file_bytes([*kept_buffers(subject.architecture), *buffers]),
        bits=8 * payload / weights,
        note="a mixture of " + ", ".join(f"{list(chosen.values()).count(kind)} {kind}" for kind in kinds),
    )


def chosen_types(mixture: str, subject: Subject) -> dict[str, str]:
    """The type of every matrix, by the matrix's name."""
    config = subject.checkpoint.config
    if config.get("model_type") not in MODELS:
        raise Unavailable(f"llama.cpp's mixtures are run for {' and '.join(MODELS)} models")
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    shape = (layers, heads, int(config.get("num_key_value_heads") or heads), not subject.architecture.tied_head)
    types = _types(MIXTURES[mixture], *shape)
    found = {}
    for matrix in subject.architecture.matrices:
        kind = types.get(gguf_name(matrix), -1)
        if kind not in NAMES:
            raise Unavailable(f"llama.cpp stores {matrix.name} in a type that is not known here")
        found[matrix.name] = NAMES[kind]
    return found


def gguf_name(matrix: Matrix) -> str:
    """What a matrix is called in a GGUF file."""
    if matrix.role in ("embedding", "head"):
        return "token_embd.weight" if matrix.role == "embedding" else "output.weight"
    match = re.fullmatch(r".*\.(\d+)\.(\w+\.\w+)", matrix.name)
    return f"blk.{match[1]}.{_NAMES.get(match[2], '')}.weight" if match else ""


def _types(ftype: int, layers: int, heads: int, kv_heads: int, output: bool) -> dict[str, int]:
    """ggml's type of each tensor that llama.cpp writes for a miniature of such a model."""
    api = library("llama_cpp.llama_cpp", "llama-cpp-python")
    silence(api)
    with TemporaryDirectory(prefix="waterfill-mixture-") as folder:
        source, target = Path(folder) / "zeros.gguf", Path(folder) / "typed.gguf"
        source.write_bytes(_miniature(layers, heads, kv_heads, output))
        options = api.llama_model_quantize_default_params()
        options.ftype, options.nthread = ftype, 1
        if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
            raise Unavailable("llama.cpp refuses a miniature of this model")
        return dict(_read_types(target.read_bytes()))


def _miniature(layers: int, heads: int, kv_heads: int, output: bool) -> bytes:
    """A GGUF file of zeros: magic, version, counts, metadata, tensor infos, tensors at multiples of 32 bytes."""
    metadata: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "no_vocab",
        "llama.vocab_size": WIDTH,
        "llama.block_count": layers,
        "llama.context_length": 512,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": WIDTH,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }
    tensors = {"token_embd.weight": 2, "output_norm.weight": 1, **({"output.weight": 2} if output else {})}
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}.weight": 1 for name in ("attn_norm", "ffn_norm")}
        tensors |= {f"blk.{layer}.{name}.weight": 2 for name in _NAMES.values()}
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    for name, dimensions in tensors.items():
        header += _text(name) + struct.pack(f"<I{dimensions}QIQ", dimensions, *[WIDTH] * dimensions, 0, offset)
        offset += 4 * WIDTH**dimensions
    return bytes(header) + bytes(-len(header) % 32) + bytes(offset)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    return struct.pack("<II", _U32, value) if isinstance(value, int) else struct.pack("<If", _F32, value)


def _read_types(content: bytes) -> Iterator[tuple[str, int]]:
    """(name, type) of each tensor of a GGUF file that llama.cpp has just written."""
    _, _, tensors, pairs = struct.unpack_from("<4sIQQ", content)
    at = 24

    def text() -> str:
        nonlocal at
        (size,) = struct.unpack_from("<Q", content, at)
        at += 8 + size
        return content[at - size : at].decode()

    def skip(kind: int) -> None:
        nonlocal at
        if kind == _STRING:
            text()
        elif kind == _ARRAY:
            inner, count = struct.unpack_from("<IQ", content, at)
            at += 12
            for _ in range(count):
                skip(inner)
        else:
            at += _SIZES[kind]

    for _ in range(pairs):
        text()
        (kind,) = struct.unpack_from("<I", content, at)
        at += 4
        skip(kind)
    for _ in range(tensors):
        name = text()
        (dimensions,) = struct.unpack_from("<I", content, at)
        (kind,) = struct.unpack_from("<I", content, at + 4 + 8 * dimensions)
        at += 4 + 8 * dimensions + 4 + 8
        yield name, kind


for _mixture in MIXTURES:
    _name = f"gguf-{_mixture.lower()}" + ("-mixed" if _mixture == "Q2_K" else "")
    _title = f"GGUF {_mixture}" + (" as llama.cpp mixes it" if _mixture == "Q2_K" else "")
    _options: Mapping[str, Any] = {"package": "llama-cpp-python", "options": "mixture"}
    register(Method(_name, _title, "GGUF", partial(run, _mixture), **_options))
    register(
        Method(
            f"{_name}-imatrix",
            f"{_title}, imatrix",
            "GGUF, imatrix",
            partial(run, _mixture, weighted=True),
            calibrated=True,
            **_options,
        )
    )
