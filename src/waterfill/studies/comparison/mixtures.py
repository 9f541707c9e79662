"""llama.cpp's mixtures (Q4_K_M and the like): which type each matrix gets is llama.cpp's own decision.

Its rules look at names, layers and head counts, never at weights. So a miniature of the model, the same but for its
widths and all zero, goes through llama.cpp's `llama_model_quantize`; the types are read from what that writes, and the
model's own matrices are quantised in them by ggml.
"""

from __future__ import annotations

import ctypes
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from waterfill.files.architecture import parameters_of
from waterfill.files.artifact import Buffer
from waterfill.files.ggml import silence
from waterfill.files.gguf import FILE_TYPES, TENSOR_TYPES, Entry, read_gguf, write_gguf
from waterfill.files.llama_names import GGUF_NORMS, GGUF_PROJECTIONS, gguf_name
from waterfill.planning.costs import matrix_view
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel, Unavailable
from waterfill.studies.comparison.ggml import NAMES, quantise
from waterfill.studies.comparison.peers import library
from waterfill.studies.comparison.stored import file_bytes, kept_buffers

MIXTURES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
MODELS = ("llama", "mistral")  # whose matrices have these names in GGUF files
WIDTH = 256  # of the miniature: every type's blocks fit


def run(mixture: str, subject: StudiedModel, put: Put, *, weighted: bool = False) -> Candidate:
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


def chosen_types(mixture: str, subject: StudiedModel) -> dict[str, str]:
    """The type of every matrix, by the matrix's name."""
    config = subject.checkpoint.config
    if config.get("model_type") not in MODELS:
        raise Unavailable(f"llama.cpp's mixtures are run for {' and '.join(MODELS)} models")
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    shape = (layers, heads, int(config.get("num_key_value_heads") or heads), not subject.architecture.tied_head)
    types = _types(FILE_TYPES[mixture], *shape)
    chosen = {}
    for matrix in subject.architecture.matrices:
        kind = types.get(gguf_name(matrix.name) or "", -1)
        if kind not in NAMES:
            raise Unavailable(f"llama.cpp stores {matrix.name} in a type that is not known here")
        chosen[matrix.name] = NAMES[kind]
    return chosen


def _types(ftype: int, layers: int, heads: int, kv_heads: int, output: bool) -> dict[str, int]:
    """ggml's type of each tensor that llama.cpp writes for a miniature of such a model."""
    api = library("llama_cpp.llama_cpp", "llama-cpp-python")
    silence(api)
    with TemporaryDirectory(prefix="waterfill-mixture-") as folder:
        source, target = Path(folder) / "zeros.gguf", Path(folder) / "typed.gguf"
        with source.open("wb") as file:
            _miniature(file, layers, heads, kv_heads, output)
        options = api.llama_model_quantize_default_params()
        options.ftype, options.nthread = ftype, 1
        if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
            raise Unavailable("llama.cpp refuses a miniature of this model")
        return {entry.name: entry.type for entry in read_gguf(target.read_bytes())[1]}


def _miniature(file: BinaryIO, layers: int, heads: int, kv_heads: int, output: bool) -> None:
    """A model of zeros."""
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
    dimensions = {"token_embd": 2, "output_norm": 1, **({"output": 2} if output else {})}
    for layer in range(layers):
        dimensions |= {f"blk.{layer}.{name}": 1 for name in GGUF_NORMS.values()}
        dimensions |= {f"blk.{layer}.{name}": 2 for name in GGUF_PROJECTIONS.values()}
    entries = [Entry(f"{name}.weight", (WIDTH,) * count, TENSOR_TYPES["F32"]) for name, count in dimensions.items()]
    sizes = [4 * math.prod(entry.shape) for entry in entries]
    write_gguf(file, metadata, [(entry, size, (bytes(size),)) for entry, size in zip(entries, sizes, strict=True)])


def _method(mixture: str, *, weighted: bool) -> Method:
    pure = mixture == "Q2_K"  # which is a type as well
    return Method(
        name=f"gguf-{mixture.lower()}" + "-mixed" * pure + "-imatrix" * weighted,
        title=f"GGUF {mixture}" + " as llama.cpp mixes it" * pure + ", imatrix" * weighted,
        family="GGUF" + ", imatrix" * weighted,
        run=partial(run, mixture, weighted=weighted),
        package="llama-cpp-python",
        calibrated=weighted,
        options="mixture",
    )


METHODS = tuple(_method(mixture, weighted=weighted) for mixture in MIXTURES for weighted in (False, True))
