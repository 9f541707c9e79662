"""ggml's products, through the libraries that llama-cpp-python or xllamacpp brings along; llama.cpp's models, through
those of the former.

Weights are random: some rows quantised by ggml itself, repeated to the size wanted. A product reads every byte of every
copy, and its time does not depend on the values.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks.peers.worker import Pass, PeerProducts
from waterfill.files.ggml import OF_ROWS, Signatures, load_ggml
from waterfill.files.gguf import TENSOR_TYPES, Entry, write_gguf
from waterfill.files.llama_names import GGUF_NORMS, GGUF_PROJECTIONS

TYPES = ("Q4_0", "Q2_K", "Q3_K", "Q4_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ4_XS")
REPACKED = ("Q4_0", "Q4_K")  # types that ggml has a layout of its own for
REPACKED_FOR_AVX512 = ("Q2_K",)
QUANTISED_ROWS = 256


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES: Signatures = {
    **OF_ROWS,
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_1d": (c_void_p, [c_void_p, c_int, c_int64]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_free": (None, [c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_cpu_has_avx512": (c_int, []),
}


@lru_cache(maxsize=1)
def ggml() -> Any:
    return load_ggml(SIGNATURES, ("ggml-base", "ggml-cpu", "ggml"))


@lru_cache(maxsize=64)
def quantised_rows(kind: str, width: int) -> np.ndarray:
    """uint8 `[256, bytes of a row]` of Gaussian weights."""
    lib, weights = ggml(), gaussian_rows(width)
    codes = np.empty((QUANTISED_ROWS, lib.ggml_row_size(TENSOR_TYPES[kind], width)), np.uint8)
    places = weights.ctypes.data, codes.ctypes.data
    alike = np.ones(width, np.float32)  # importance of columns, which the smallest types ask for
    lib.ggml_quantize_chunk(TENSOR_TYPES[kind], *places, 0, QUANTISED_ROWS, width, alike.ctypes.data)
    return codes


def gaussian_rows(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((QUANTISED_ROWS, width), dtype=np.float32) * 0.02


def bits_per_weight(kind: str, width: int = 4096) -> float:
    return 8 * float(ggml().ggml_row_size(TENSOR_TYPES[kind], width)) / width


def relative_error(kind: str, width: int = 4096) -> float:
    """|decoded - weights|^2 / |weights|^2 of Gaussian weights."""
    codes, weights = quantised_rows(kind, width), gaussian_rows(width)
    decoded = np.empty_like(weights)
    ggml().ggml_get_type_traits(TENSOR_TYPES[kind]).contents.to_float(
        codes.ctypes.data, decoded.ctypes.data, weights.size
    )
    return float(np.square(decoded - weights).sum(dtype=np.float64) / np.square(weights).sum(dtype=np.float64))


class Ggml(PeerProducts):
    """ggml_mul_mat on the CPU backend: as stored, or in the layout that llama.cpp repacks to; the faster is taken."""

    def __init__(self) -> None:
        super().__init__()
        repacked = REPACKED + REPACKED_FOR_AVX512 * bool(ggml().ggml_cpu_has_avx512())
        self.kinds = {f"ggml {kind}": [(kind, False)] + [(kind, True)] * (kind in repacked) for kind in TYPES}

    def relative_error(self, kind: str) -> float:
        """What a type leaves of the power of Gaussian weights."""
        return relative_error(kind)

    def label(self, variant: tuple[str, bool]) -> str:
        return "repacked" if variant[1] else "as stored"

    def build(
        self, variant: tuple[str, bool], rows: int, width: int, cold_bytes: int, threads: int
    ) -> tuple[Pass, int, int]:
        kind, repacked = variant
        matrix = np.tile(quantised_rows(kind, width), (-(-rows // QUANTISED_ROWS), 1))[:rows]
        count = -(-cold_bytes // matrix.nbytes)
        return (
            Graph(TENSOR_TYPES[kind], matrix, width, count, threads, repacked).run,
            rows * width * count,
            matrix.nbytes * count,
        )


class Graph:
    """`count` products of one vector with copies of a matrix."""

    def __init__(self, kind: int, matrix: np.ndarray, width: int, count: int, threads: int, repacked: bool) -> None:
        lib = self._lib = ggml()
        self._backend = lib.ggml_backend_cpu_init()
        lib.ggml_backend_cpu_set_n_threads(self._backend, threads)
        plain = lib.ggml_backend_cpu_buffer_type()
        self._contexts = [lib.ggml_init(InitParams(1024 * count + (1 << 20), None, True)) for _ in range(2)]
        stored, computed = self._contexts
        weights = [lib.ggml_new_tensor_2d(stored, kind, width, len(matrix)) for _ in range(count)]
        self._buffers = [lib.ggml_backend_alloc_ctx_tensors_from_buft(stored, self._repacking() if repacked else plain)]
        for weight in weights:
            lib.ggml_backend_tensor_set(weight, matrix.ctypes.data, 0, matrix.nbytes)
        x = lib.ggml_new_tensor_1d(computed, TENSOR_TYPES["F32"], width)
        self._graph = lib.ggml_new_graph_custom(computed, 2 * count + 8, False)
        for weight in weights:
            lib.ggml_build_forward_expand(self._graph, lib.ggml_mul_mat(computed, weight, x))
        self._buffers.append(lib.ggml_backend_alloc_ctx_tensors_from_buft(computed, plain))
        vector = np.random.default_rng(1).standard_normal(width, dtype=np.float32)
        lib.ggml_backend_tensor_set(x, vector.ctypes.data, 0, vector.nbytes)

    def run(self) -> None:
        if self._lib.ggml_backend_graph_compute(self._backend, self._graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    def __del__(self) -> None:
        for buffer in self._buffers:
            self._lib.ggml_backend_buffer_free(buffer)
        for context in self._contexts:
            self._lib.ggml_free(context)
        self._lib.ggml_backend_free(self._backend)

    def _repacking(self) -> int:
        """The buffer type whose tensors are repacked as they are written."""
        lib = self._lib
        device = lib.ggml_backend_get_device(self._backend)
        address = lib.ggml_backend_reg_get_proc_address(
            lib.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
        )
        types = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        for i in range(16):
            if types[i] is None:
                break
            if lib.ggml_backend_buft_name(types[i]) == b"CPU_REPACK":
                return int(types[i])
        raise RuntimeError("this build of ggml does not repack")


class LlamaCpp:
    """Whole models of Llama shapes."""

    def __init__(self) -> None:
        ggml()
        import llama_cpp

        self._api = llama_cpp
        llama_cpp.llama_backend_init()
        self._models: dict[str, tuple[Any, Any]] = {}

    def load(self, kind: str, shapes: dict[str, Any], folder: str, threads: int) -> dict[str, int]:
        """Write a model of random weights, all matrices of one type, and load it; the bytes of its matrices."""
        path = Path(folder) / f"{kind}.gguf"
        with path.open("wb") as file:
            size_bytes = write_model(file, kind, shapes)
        self.open(kind, str(path), threads)
        path.unlink()  # mapped by now, if it is wanted
        return {"size_bytes": size_bytes}

    def open(self, name: str, path: str, threads: int, batch: int = 512, mode: str | None = None) -> None:
        """Load a file as model `name`: as the build does by default, or with "mmap", "direct_io" or "none" of them."""
        api = self._api
        options = api.llama_model_default_params()
        if mode is not None:
            if not hasattr(api, "LLAMA_LOAD_MODE_MMAP"):
                raise RuntimeError("this build of llama.cpp does not let loading be chosen")
            options.load_mode = getattr(api, f"LLAMA_LOAD_MODE_{mode.upper()}")
            options.use_extra_bufts = False  # repacked weights are a copy in memory, whatever is mapped
        model = api.llama_model_load_from_file(path.encode(), options)
        if not model:
            raise RuntimeError(f"llama.cpp could not load {Path(path).name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = 512
        settings.n_batch = settings.n_ubatch = batch
        settings.n_threads = settings.n_threads_batch = threads
        context = api.llama_init_from_model(model, settings)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        self._models[name] = context, api.llama_sampler_init_greedy()

    def decode(self, kind: str, prompt: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` tokens after a prompt of so many, greedily."""
        context, sampler = self._models[kind]
        self.prefill(kind, prompt)
        seconds = []
        for _ in range(tokens):
            start = time.perf_counter()
            self._feed(context, [self._api.llama_sampler_sample(sampler, context, -1)])
            seconds.append(time.perf_counter() - start)
        return seconds

    def prefill(self, kind: str, tokens: int) -> float:
        """Seconds that a prompt takes, up to the choice of the token after it."""
        context, sampler = self._models[kind]
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        self._feed(context, list(range(1, tokens + 1)))
        api.llama_sampler_sample(sampler, context, -1)
        return time.perf_counter() - start

    def _feed(self, context: Any, ids: list[int]) -> None:
        array = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(context, self._api.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")


def write_model(file: BinaryIO, kind: str, shapes: dict[str, Any], *, words: bool = False) -> int:
    """A GGUF file of random weights, with a vocabulary of `words` or without any; `shapes` as in LlamaConfig. Returns
    its matrices' bytes."""
    tensors: list[tuple[Entry, int, Iterable[bytes]]] = []
    for name, width, rows in llama_tensors(shapes):
        size_bytes = tensor_bytes(kind, width, rows)
        if rows is None:
            norm = Entry(name, (width,), TENSOR_TYPES["F32"])
            tensors.append((norm, size_bytes, (np.ones(width, np.float32).tobytes(),)))
        else:
            tensors.append((Entry(name, (rows, width), TENSOR_TYPES[kind]), size_bytes, repeated(kind, width, rows)))
    vocabulary = words_of(shapes["vocab_size"]) if words else {"tokenizer.ggml.model": "no_vocab"}
    write_gguf(file, metadata_of(shapes) | vocabulary, tensors)
    return sum(size_bytes for entry, size_bytes, _ in tensors if len(entry.shape) == 2)


def repeated(kind: str, width: int, rows: int) -> Iterator[bytes]:
    """A matrix, block by block."""
    block = quantised_rows(kind, width)
    for first in range(0, rows, len(block)):
        yield block[: rows - first].tobytes()


def llama_tensors(shapes: dict[str, Any]) -> Iterator[tuple[str, int, int | None]]:
    """(name, width, rows) of each matrix; rows is None for the weights of a norm."""
    hidden, inner, head = shapes["hidden_size"], shapes["intermediate_size"], shapes["head_dim"]
    queries, keys = head * shapes["num_attention_heads"], head * shapes["num_key_value_heads"]
    shape_of = {
        "q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden),
        "gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden),
    }  # fmt: skip
    yield "token_embd.weight", hidden, shapes["vocab_size"]
    yield "output_norm.weight", hidden, None
    for layer in range(shapes["num_hidden_layers"]):
        for norm, keys_of in ((GGUF_NORMS["input_norm"], "qkvo"), (GGUF_NORMS["post_norm"], ("gate", "up", "down"))):
            yield f"blk.{layer}.{norm}.weight", hidden, None
            for key in keys_of:
                yield f"blk.{layer}.{GGUF_PROJECTIONS[key]}.weight", *shape_of[key]


def metadata_of(shapes: dict[str, Any]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.vocab_size": shapes["vocab_size"],
        "llama.block_count": shapes["num_hidden_layers"],
        "llama.context_length": 4096,
        "llama.embedding_length": shapes["hidden_size"],
        "llama.feed_forward_length": shapes["intermediate_size"],
        "llama.attention.head_count": shapes["num_attention_heads"],
        "llama.attention.head_count_kv": shapes["num_key_value_heads"],
        "llama.attention.key_length": shapes["head_dim"],
        "llama.attention.value_length": shapes["head_dim"],
        "llama.rope.dimension_count": shapes["head_dim"],
        "llama.rope.freq_base": float(shapes["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
    }


def words_of(count: int) -> dict[str, Any]:
    """A vocabulary that nothing is read with."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(count)],
        "tokenizer.ggml.token_type": [1] * count,
        "tokenizer.ggml.merges": ["a b"],
    }


def tensor_bytes(kind: str, width: int, rows: int | None) -> int:
    return 4 * width if rows is None else rows * int(ggml().ggml_row_size(TENSOR_TYPES[kind], width))
