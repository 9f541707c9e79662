"""Fixed-rate quantisers for `compressibility.py`: codes, stored bytes and the weights that come back.

    INT        symmetric, scale = largest magnitude / (2^(bits-1) - 1) in fp16; per tensor, per row or per group
    NF4        bitsandbytes' 16 values, largest magnitude of 64 weights in fp16
    Q4_0       GGUF: 32 weights, scale = value of largest magnitude / -8 in fp16, blocks of 18 bytes
    HIGGS      waterfill's fixed-rate grids, always rotated

Groups run through the matrix as it lies in memory, as in llama.cpp's and bitsandbytes' formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from waterfill.codecs import Higgs, get_codec, scale_exponent
from waterfill.codecs.entropy.fields import pack_fields
from waterfill.codecs.hadamard import rotate, unrotate
from waterfill.codecs.indices import unpack

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
GROUPS = {"tensor": -1, "row": 0, "g128": 128, "g64": 64, "g32": 32}

Symbols = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Quantised:
    """A matrix as a format stores it."""

    weight: Tensor  # float32, as it comes back
    codes: Symbols  # one per vector
    packed: Symbols  # the same as the format packs them
    scales: Symbols  # bytes of the fp16 scales
    mixed: Symbols | None = None  # where the format has scales between the codes: all of its bytes

    @property
    def size_bytes(self) -> int:
        return len(self.packed) + len(self.scales)


Quantiser = Callable[[Tensor, float], Quantised]  # of a matrix and the gain rho, which only HIGGS uses


def integer(weight: Tensor, rho: float, *, bits: int, group: int) -> Quantised:
    del rho
    values = weight.reshape({-1: 1, 0: len(weight)}.get(group, -1), -1 if group <= 0 else group)
    most = 2 ** (bits - 1) - 1
    scale = half(values.abs().amax(1, keepdim=True) / most)
    level = (values / scale).round().clamp(-most, most)
    codes = (level + most).to(torch.uint8).flatten().numpy()
    return Quantised((level * scale).view_as(weight), codes, fields(codes, bits), as_bytes(scale))


def nf4(weight: Tensor, rho: float, *, group: int) -> Quantised:
    del rho
    values, table = weight.reshape(-1, group), torch.tensor(NF4_VALUES)
    scale = half(values.abs().amax(1, keepdim=True))
    index = torch.bucketize(values / scale, (table[1:] + table[:-1]) / 2)
    codes = index.to(torch.uint8).flatten().numpy()
    return Quantised((table[index] * scale).view_as(weight), codes, fields(codes, 4), as_bytes(scale))


def q4_0(weight: Tensor, rho: float) -> Quantised:
    del rho
    values = weight.reshape(-1, 32)
    scale = values.gather(1, values.abs().argmax(1, keepdim=True)) / -8
    index = (values / torch.where(scale == 0, 1, scale) + 8.5).trunc().clamp(0, 15)
    scale = half(scale)
    codes = index.to(torch.uint8).numpy()
    packed = codes[:, :16] | codes[:, 16:] << 4
    scales = as_bytes(scale)
    mixed = np.concatenate([scales.reshape(-1, 2), packed], axis=1).reshape(-1)
    return Quantised(((index - 8) * scale).view_as(weight), codes.reshape(-1), packed.reshape(-1), scales, mixed)


def higgs(weight: Tensor, rho: float, *, name: str) -> Quantised:
    codec = get_codec(name)
    assert isinstance(codec, Higgs)
    encoded = codec.encode(weight, exponent=scale_exponent(float(weight.abs().max())), rho=rho)
    rows, width = weight.shape
    packed, row_bytes = encoded.buffers["codes"], codec.row_bytes(width)
    indices = unpack(packed[: rows * row_bytes].view(rows, row_bytes), -(-width // codec.p), codec.n)
    codes = indices.to(torch.uint8).flatten().numpy()
    scales = encoded.buffers["scales"].view(torch.uint8).flatten().numpy()
    return Quantised(codec.decode(encoded), codes, packed.numpy(), scales)


def rotated(weight: Tensor, rho: float, *, quantiser: Quantiser) -> Quantised:
    """The same in the Hadamard basis."""
    found = quantiser(rotate(weight), rho)
    return Quantised(unrotate(found.weight), found.codes, found.packed, found.scales, found.mixed)


def quantisers(bits: Sequence[int], more_bits: Sequence[int]) -> dict[str, Quantiser]:
    """Every method by name, without and with the rotation where it makes a difference; `more_bits` of INT without."""
    plain = {f"INT{b} {name}": partial(integer, bits=b, group=group) for b in bits for name, group in GROUPS.items()}
    plain |= {"NF4 g64": partial(nf4, group=64), "Q4_0": q4_0}
    found: dict[str, Quantiser] = {**plain}
    found |= {f"{name} + Hadamard": partial(rotated, quantiser=quantiser) for name, quantiser in plain.items()}
    for b in more_bits:
        found |= {f"INT{b} {name}": partial(integer, bits=b, group=group) for name, group in GROUPS.items()}
    names = ("higgs-p1-n16", "higgs-p2-n16", "higgs-p2-n64", "higgs-p2-n256")
    return found | {f"HIGGS {name.removeprefix('higgs-')}": partial(higgs, name=name) for name in names}


def fields(codes: Symbols, bits: int) -> Symbols:
    return codes if bits == 8 else np.frombuffer(pack_fields(codes, bits), np.uint8)


def half(values: Tensor) -> Tensor:
    """As fp16 holds them, never zero where something has to be divided."""
    rounded = values.half().float()
    return torch.where(rounded == 0, torch.finfo(torch.float16).tiny, rounded)


def as_bytes(scale: Tensor) -> Symbols:
    return scale.half().flatten().view(torch.uint8).numpy()
