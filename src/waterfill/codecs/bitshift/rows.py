"""Windows of rows <-> bytes, and the order in which a row's path goes through its columns.

A row is cut into 16 lanes, each of every 16th column, and the path goes through one lane after the other. Columns that
lie side by side are then at the same step of neighbouring lanes, which vectors decode together; and error feedback has
lanes to make up for what the lanes before them lost.

    path:    lane 0: columns 0, 16, 32, …   lane 1: columns 1, 17, 33, …   …   lane 15
    bytes:   of each register in turn, its symbols in the order of columns, as bit fields (`codecs.indices`)

Rows are padded with zeros to whole steps of all lanes, and to pairs of steps where a register is shifted every second.
"""

from __future__ import annotations

from waterfill.base.lazy import torch
from waterfill.codecs import indices
from waterfill.codecs.bitshift.code import Code, Register

LANES = 16


def padded(width: int, code: Code) -> int:
    """Columns of a row of `width` with those that are only there to be shifted."""
    whole = LANES * code.period
    return -(-width // whole) * whole


def row_bytes(width: int, code: Code) -> int:
    """Of a row's symbols."""
    return sum(_bytes(width, code, register) for register in code.registers)


def _bytes(width: int, code: Code, register: Register) -> int:
    return indices.row_bytes(padded(width, code) // register.every, 1 << register.bits)


def in_path(columns: torch.Tensor) -> torch.Tensor:
    """`[rows, columns]` -> in the order of the path, `[rows, LANES, steps]`."""
    return columns.view(len(columns), -1, LANES).transpose(1, 2)


def in_columns(path: torch.Tensor) -> torch.Tensor:
    """The inverse of `in_path`: `[rows, LANES, steps]` -> `[rows, columns]`."""
    return path.transpose(1, 2).reshape(len(path), -1)


def pack(windows: torch.Tensor, code: Code) -> torch.Tensor:
    """int64 `[rows, LANES, steps]` -> uint8 `[rows, row_bytes]`."""
    parts, rest = [], windows
    for register in code.registers:
        symbols = (rest & ((1 << register.bits) - 1))[:, :, :: register.every]
        parts.append(indices.pack(in_columns(symbols).contiguous(), 1 << register.bits))
        rest = rest >> register.width
    return torch.cat(parts, dim=1)


def unpack(packed: torch.Tensor, width: int, code: Code) -> torch.Tensor:
    """The inverse of `pack`, of rows of `width`."""
    windows, at, shift = torch.zeros((), dtype=torch.int64), 0, 0
    for register in code.registers:
        size = _bytes(width, code, register)
        symbols = indices.unpack(
            packed[:, at : at + size].contiguous(), padded(width, code) // register.every, 1 << register.bits
        )
        part = _shifted(in_path(symbols).reshape(len(packed), -1), register)
        windows = windows | part.repeat_interleave(register.every, dim=1) << shift
        at, shift = at + size, shift + register.width
    return windows.view(len(packed), LANES, -1)


def _shifted(symbols: torch.Tensor, register: Register) -> torch.Tensor:
    """The register after each of a path's symbols, `[rows, symbols]`."""
    after = symbols.clone()
    for age in range(1, min(register.symbols, symbols.shape[1])):
        after[:, age:] |= symbols[:, :-age] << age * register.bits
    return after
