"""GGUF's formats through the ggml library that llama-cpp-python brings along: its own quantisers, its own decoders.

A matrix is quantised row by row as llama.cpp's `quantize --pure` does it: one type for all, with llama.cpp's own
replacement where a row is no multiple of the type's block. With an importance matrix the quantisers weigh errors by the
second moments of the inputs, measured on the calibration tokens; llama.cpp has none for token embeddings.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from waterfill.files.artifact import Buffer
from waterfill.files.ggml import load_ggml
from waterfill.files.gguf import TENSOR_TYPES
from waterfill.studies.comparison.base import Candidate, Method, Put, StudiedModel, Unavailable
from waterfill.studies.comparison.stored import QuantisedMatrix, quantised, run_quantiser

TYPES = (
    "Q2_K", "IQ2_S", "IQ3_XXS", "Q3_K", "IQ3_S", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_0", "Q5_1", "Q5_K",
    "Q6_K", "Q8_0",
)  # fmt: skip
NAMES = {TENSOR_TYPES[name]: name for name in (*TYPES, "F16")}
# llama.cpp's tensor_type_fallback: what stands in where a row is no multiple of 256.
_FALLBACK = {"IQ2_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0"}
_FALLBACK |= {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@cache
def _ggml() -> Any:
    try:
        return load_ggml()
    except ModuleNotFoundError as error:
        raise Unavailable("llama-cpp-python is not installed; pip install 'waterfill[compare]'") from error
    except ImportError as error:
        raise Unavailable(str(error)) from error


def fitting(kind: str, width: int) -> str:
    """The type that llama.cpp stores rows of this width in when asked for `kind`."""
    lib = _ggml()
    chosen = kind
    if width % lib.ggml_get_type_traits(TENSOR_TYPES[kind]).contents.block:
        chosen = _FALLBACK.get(kind, kind)
    return "F16" if width % lib.ggml_get_type_traits(TENSOR_TYPES[chosen]).contents.block else chosen


def quantise(weight: Tensor, kind: str, importance: Tensor | None = None) -> QuantisedMatrix:
    """Encode and decode one matrix; `importance` weighs the errors of its columns, float32 [in]."""
    lib = _ggml()
    rows, width = weight.shape
    chosen = fitting(kind, width)
    if chosen == "F16":
        return quantised(weight.half().float(), {chosen.lower(): Buffer("f16", "F16", (rows, width))})
    number = TENSOR_TYPES[chosen]
    codes = torch.empty(rows, lib.ggml_row_size(number, width), dtype=torch.uint8)
    source = weight.to(torch.float32).contiguous()
    scales = None if importance is None else importance.to(torch.float32).contiguous()
    pointer = None if scales is None else scales.data_ptr()
    written = lib.ggml_quantize_chunk(number, source.data_ptr(), codes.data_ptr(), 0, rows, width, pointer)
    if written != codes.nbytes:
        raise Unavailable(f"ggml wrote {written} bytes of {chosen} where {codes.nbytes} were expected")
    decoded = torch.empty(rows, width)
    lib.ggml_get_type_traits(number).contents.to_float(codes.data_ptr(), decoded.data_ptr(), rows * width)
    return quantised(decoded, {chosen.lower(): codes})


def run(kind: str, subject: StudiedModel, put: Put, *, weighted: bool = False) -> Candidate:
    """All matrices in one type."""
    _ggml()
    note = _replaced(kind, subject)
    if not weighted:
        result = run_quantiser(partial(quantise, kind=kind), subject, put)
    else:
        moments = subject.moments
        names = iter([matrix.name for matrix in subject.architecture.matrices])
        result = run_quantiser(lambda weight: quantise(weight, kind, moments.get(next(names))), subject, put)
    return Candidate(result.size_bytes, result.bits, note="; ".join(filter(None, (note, result.note))))


def _replaced(kind: str, subject: StudiedModel) -> str:
    """What llama.cpp stores otherwise than it was asked to."""
    matrices = subject.architecture.matrices
    other = [(matrix, fitting(kind, matrix.shape[1])) for matrix in matrices]
    other = [(matrix, chosen) for matrix, chosen in other if chosen != kind]
    if not other:
        return ""
    width, chosen = other[0][0].shape[1], other[0][1]
    return f"{len(other)} of {len(matrices)} matrices are {chosen}: rows of {width} do not fit {kind}'s blocks"


def _method(kind: str, *, weighted: bool) -> Method:
    return Method(
        name=f"gguf-{kind.lower()}" + "-imatrix" * weighted,
        title=f"GGUF {kind}" + ", imatrix" * weighted,
        family="GGUF" + ", imatrix" * weighted,
        run=partial(run, kind, weighted=weighted),
        package="llama-cpp-python",
        calibrated=weighted,
        options="pure",
    )


METHODS = (
    *(_method(kind, weighted=False) for kind in TYPES),
    *(_method(kind, weighted=True) for kind in TYPES if kind != "Q8_0"),
)
