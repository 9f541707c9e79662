"""Peers through their own libraries: bitsandbytes, hqq, optimum-quanto, torchao. Each imports its library when it runs.

What is charged is what the library would save: codes, scales, zeros, second-level scales and tables. Scales are fp16
where a library takes its caller's dtype.
"""

from __future__ import annotations

import contextlib
import io
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from waterfill.base.errors import first_line
from waterfill.files.artifact import Buffer
from waterfill.studies.comparison.base import Method, Unavailable
from waterfill.studies.comparison.stored import QuantisedMatrix, Quantiser, quantised, run_quantiser

HQQ_GROUP = 64  # its own default
TORCHAO_GROUP = 32
_MISSING = "{0} is not installed; pip install {1}"


def library(name: str, package: str) -> Any:
    """Import a peer, quietly; Unavailable with one sentence where that fails."""
    from importlib import import_module

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what is missing of a library's own extras is not the user's business
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == name.partition(".")[0]:
            extra = package if package == "gptqmodel" else "'waterfill[compare]'"  # which asks for a torch of its own
            raise Unavailable(_MISSING.format(package, extra)) from error
        raise Unavailable(f"{package} needs {error.name}, which is not installed") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"{package} cannot be imported ({first_line(error)})") from error
    finally:
        logging.disable(before)


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def bnb_4bit(weight: Tensor, kind: str, *, double: bool) -> QuantisedMatrix:
    """NF4 or FP4 in blocks of 64; with `double`, absmax in 8 bits, and a scale for every 256 of them."""
    functional = library("bitsandbytes.functional", "bitsandbytes")
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    kept = {key.replace(".", "_"): part for key, part in state.as_dict(packed=True).items()}
    return quantised(functional.dequantize_4bit(codes, state), {"weight": codes, **kept})


def bnb_int8(weight: Tensor) -> QuantisedMatrix:
    """LLM.int8()'s weights: one absmax per row."""
    functional = library("bitsandbytes.functional", "bitsandbytes")
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return quantised(functional.int8_vectorwise_dequant(codes, scale), {"weight": codes, "SCB": scale})


# ----------------------------------------------------------------------------------------------------------------- hqq


def hqq(weight: Tensor, bits: int, group: int = HQQ_GROUP, axis: int = 1) -> QuantisedMatrix:
    """Half-quadratic quantisation as in hqq's `hqq_base_quant_config`: the zero is rounded at 4 bits only.

    Its 3-bit indices take 3.2 bits: ten of them lie in 32.
    """
    core = library("hqq.core.quantize", "hqq")
    if weight.numel() % group or (axis == 1 and weight.shape[1] % group):
        raise Unavailable(f"rows are not whole groups of {group}")
    codes, meta = core.Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=axis, round_zero=bits == 4, device="cpu"
    )
    scale, zero = meta["scale"].half(), meta["zero"].half()
    meta |= {"scale": scale.float(), "zero": zero.float(), "compute_dtype": torch.float32}
    return quantised(core.Quantizer.dequantize(codes, meta), {"W_q": codes, "scale": scale, "zero": zero})


# ------------------------------------------------------------------------------------------------------ optimum-quanto


def quanto(weight: Tensor, kind: str) -> QuantisedMatrix:
    """A linear layer quantised and frozen as `optimum.quanto.quantize` does it; groups as it chooses them."""
    package = library("optimum.quanto", "optimum-quanto")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
    linear.weight.data.copy_(weight)
    module = package.nn.QLinear.from_module(linear, weights=getattr(package, kind))
    module.freeze()
    kept: dict[str, Tensor] = {}
    module.weight.save_to_state_dict(kept, "weight.", False)
    return quantised(
        module.weight.dequantize(), {key.rpartition(".")[2].strip("_"): part for key, part in kept.items()}
    )


# ------------------------------------------------------------------------------------------------------------- torchao


def torchao_int8(weight: Tensor) -> QuantisedMatrix:
    """Int8 weights, one scale per row."""
    tensor = _torchao(weight, "Int8WeightOnlyConfig")
    return quantised(tensor.dequantize(), {"qdata": tensor.qdata, "scale": tensor.scale})


def torchao_int4(weight: Tensor) -> QuantisedMatrix:
    """Int4 weights in groups of 32 with zero points. Charged at 4 bits, though torchao's layout for CPUs takes 8."""
    if weight.shape[1] % TORCHAO_GROUP:
        raise Unavailable(f"rows are not whole groups of {TORCHAO_GROUP}")
    package = library("torchao.quantization", "torchao")
    tensor = _torchao(
        weight,
        "IntxWeightOnlyConfig",
        weight_dtype=vars(torch)["int4"],  # torch's own stubs lack it
        granularity=package.PerGroup(TORCHAO_GROUP),
        mapping_type=package.MappingType.ASYMMETRIC,
    )
    codes = Buffer("qdata", "U8", (-(-weight.numel() // 2),))
    kept = {"qdata": codes, "scale": tensor.scale, "zero_point": tensor.zero_point}
    return quantised(tensor.dequantize(), kept)


def _torchao(weight: Tensor, config: str, **options: object) -> Any:
    package = library("torchao.quantization", "torchao")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(weight)
    package.quantize_(linear, getattr(package, config)(**options))
    if type(linear.weight.data) is Tensor:
        raise Unavailable("torchao leaves this matrix as it is")
    return linear.weight.data


# ------------------------------------------------------------------------------------------------------------- methods


def _method(name: str, title: str, family: str, package: str, quantiser: Quantiser) -> Method:
    return Method(name, title, family, partial(run_quantiser, quantiser), package)


_BNB = ("bitsandbytes", "bitsandbytes")
_QUANTO = ("optimum-quanto", "optimum-quanto")
METHODS = (
    _method("bnb-nf4", "NF4", *_BNB, partial(bnb_4bit, kind="nf4", double=False)),
    _method("bnb-nf4-double", "NF4, double quantisation", *_BNB, partial(bnb_4bit, kind="nf4", double=True)),
    _method("bnb-fp4", "FP4", *_BNB, partial(bnb_4bit, kind="fp4", double=False)),
    _method("bnb-int8", "LLM.int8()", *_BNB, bnb_int8),
    _method("hqq-2-g16", "HQQ 2 bits, groups of 16", "hqq", "hqq", partial(hqq, bits=2, group=16)),
    *(_method(f"hqq-{bits}", f"HQQ {bits} bits", "hqq", "hqq", partial(hqq, bits=bits)) for bits in (2, 3, 4, 8)),
    *(
        _method(f"quanto-{kind[1:]}", f"quanto {kind}", *_QUANTO, partial(quanto, kind=kind))
        for kind in ("qint2", "qint4", "qint8", "qfloat8")
    ),
    _method("torchao-int4", "torchao int4", "torchao", "torchao", torchao_int4),
    _method("torchao-int8", "torchao int8", "torchao", "torchao", torchao_int8),
)
