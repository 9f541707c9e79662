"""Trellis of fixed rate: `bitshift-2.5` takes 2.5 bits of every weight, besides the scales.

    weight [rows, in] --rotate--> --/ scale per (row, group)--> x --nearest path of levels--> windows --> symbols
    stored: scales F16 [rows, groups], codes U8 [rows * row_bytes]

Rows are independent, and each has its own path. Level times scale is the weight, and kernels compute levels as they go.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache

import numpy as np

from waterfill.base.errors import WaterfillError
from waterfill.base.lazy import torch
from waterfill.base.native import Native
from waterfill.codecs.bitshift import rows
from waterfill.codecs.bitshift.code import RATES, REGISTERS, WINDOW, Code, code_of, search
from waterfill.codecs.contract import Encoded, MemoryForm, Rates, Shape
from waterfill.codecs.feedback import Blocks, Feedback, interleaved
from waterfill.codecs.groups import TINY, per_weight
from waterfill.codecs.hadamard import unrotate
from waterfill.codecs.table import ScaledCodec

PIECE = 256  # steps of a path that are decided together
AHEAD = 24  # steps that are looked ahead: twice what a window remembers
ALL = Rates("bitshift-{:g}", min(REGISTERS), max(REGISTERS), 0.5)


class Bitshift(ScaledCodec, MemoryForm):
    """Codec `bitshift-{rate}`."""

    rates = ALL
    precision = 8

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.name = f"bitshift-{rate:g}"

    @cached_property
    def code(self) -> Code:
        """What computes the levels."""
        return code_of(self.rate)

    def row_bytes(self, width: int) -> int:
        return rows.row_bytes(width, self.code)

    def distortion(self, shape: Shape) -> float:
        """Of a long path, and what it costs that every row's begins at the same window."""
        known = WINDOW - self.rate  # bits that others would have chosen
        return min(self.code.t2 * math.exp2(2 * known / rows.padded(shape[1], self.code)), 1.0)

    def feedback(self, width: int) -> Blocks:
        return interleaved(width, rows.LANES)  # one lane after the other

    def coded(
        self, rotated: torch.Tensor, deviations: torch.Tensor, feedback: Feedback | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        units = (deviations * self.code.step).clamp_min(TINY)
        if feedback is None:
            windows = self._path(self._in_lanes(rotated / units))
        else:
            windows = self._fed_back(rotated, units, feedback)
        return self._levels(windows, rotated.shape[1]).to(torch.float32), rows.pack(windows, self.code)

    def _in_lanes(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of whole rows, and zeros behind them: `[rows, width]` -> `[rows, LANES, steps]`."""
        missing = rows.padded(columns.shape[1], self.code) - columns.shape[1]
        return rows.in_path(torch.nn.functional.pad(columns, (0, missing)))

    def _levels(self, windows: torch.Tensor, width: int) -> torch.Tensor:
        """Of int64 `[rows, LANES, steps]`, int8 `[rows, width]`."""
        return rows.in_columns(torch.from_numpy(self.code.levels)[windows])[:, :width]

    def _path(self, targets: torch.Tensor) -> torch.Tensor:
        """Windows of the nearest paths, int64 `[rows, LANES, steps]`: some steps at a time, as far as they are sure."""
        path = targets.reshape(len(targets), -1).numpy()
        windows, start = np.empty(path.shape, np.uint16), np.zeros(len(path), np.uint16)
        for first in range(0, path.shape[1], PIECE):
            found = search(path[:, first : first + PIECE + AHEAD], self.code, start, first=first)
            windows[:, first : first + PIECE] = found[:, :PIECE]
            start = windows[:, min(first + PIECE, path.shape[1]) - 1]
        return torch.from_numpy(windows.astype(np.int64)).view(targets.shape)

    def _fed_back(self, rotated: torch.Tensor, units: torch.Tensor, feedback: Feedback) -> torch.Tensor:
        """Windows of rows that are encoded lane after lane, int64 `[rows, LANES, steps]`."""
        count, width = rotated.shape
        blocks = self.feedback(width)
        pushes = feedback.pushes(blocks, self.distortion((count, width)))
        steps, size = rows.padded(width, self.code) // rows.LANES, width // rows.LANES
        windows = np.zeros((count, rows.LANES, steps), np.uint16)
        errors, start = torch.empty(count, width), np.zeros(count, np.uint16)

        def target(lane: int, known: int, columns: int) -> torch.Tensor:
            """Of the first columns of a lane, given the errors of so many that were encoded."""
            wanted = rotated[:, blocks[lane]] + errors[:, :known] @ pushes[lane][:known]
            return torch.nn.functional.pad(wanted / units[:, blocks[lane]], (0, steps - size))[:, :columns]

        for lane, block in enumerate(blocks):
            known = lane * size
            parts = [target(lane, known, steps)]
            if lane + 1 < rows.LANES:
                parts.append(target(lane + 1, known, AHEAD))
            found = search(torch.cat(parts, dim=1).numpy(), self.code, start, first=lane * steps)
            windows[:, lane], start = found[:, :steps], found[:, steps - 1]
            reached = self.code.levels[found[:, :size]].astype(np.float32)
            errors[:, known : known + size] = rotated[:, block] - torch.from_numpy(reached) * units[:, block]
        return torch.from_numpy(windows.astype(np.int64))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        codes, scales = encoded.buffers["codes"], encoded.buffers["scales"]
        return unrotate(self.decode_rotated(codes, scales, encoded.exponent, encoded.shape[1]))

    def decode_rotated(self, codes: torch.Tensor, scales: torch.Tensor, exponent: int, width: int) -> torch.Tensor:
        each, count = self.row_bytes(width), len(scales)
        levels, _ = self.whole_numbers(codes.flatten()[: count * each].view(count, each), width)
        return levels.to(torch.float32) * per_weight(scales.to(torch.float32) * 2.0**exponent, width)

    def whole_numbers(self, codes: torch.Tensor, width: int) -> tuple[torch.Tensor, float]:
        return self._levels(rows.unpack(codes, width, self.code), width), 1.0

    def new_table(self, library: Native, isa: int) -> tuple[float, int]:
        code, halves = self.code, round(2 * self.rate)
        return 1.0, library.window_table_new(isa, halves=halves, hashed=code.hashes, levels=code.parts)

    def native_fields(self, width: int) -> Mapping[str, int]:
        return {"word_indices": 0, "word_bytes": 0, "row_bytes": self.row_bytes(width)}


@lru_cache(maxsize=64)
def bitshift(name: str) -> Bitshift:
    """Codec from its name, `bitshift-2.5`."""
    match = re.fullmatch(r"bitshift-([1-9](?:\.5)?)", name)
    if match is None or float(match[1]) not in REGISTERS:
        raise WaterfillError(
            f"codec {name!r} is not a bitshift trellis; expected a name like bitshift-2.5, of {RATES} bits"
        )
    return Bitshift(float(match[1]))


def any_rate(name: str) -> Rates | None:
    """What "bitshift" stands for: every rate."""
    return ALL if name == "bitshift" else None
