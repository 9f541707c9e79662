"""Budgets as people write them: bytes of the artifact, bits per weight of the matrices, a predicted loss, a speed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from waterfill.base.errors import BudgetError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Budget:
    """Exactly one of three limits, or a speed, which goes with a limit of bytes as well."""

    size_bytes: int | None = None  # all weight files of the artifact
    bits: float | None = None  # stored bits per weight of the matrices: indices, scales, padding
    max_kl: float | None = None  # predicted KL, nats per token
    speed: float | None = None  # tokens per second at least, of products alone

    def __post_init__(self) -> None:
        limits = {"--size": self.size_bytes, "--bits": self.bits, "--max-kl": self.max_kl}
        named = [name for name, value in limits.items() if value is not None]
        if len(named) > 1 or not (named or self.speed is not None):
            raise BudgetError(
                f"a plan needs exactly one of --size, --bits, --max-kl and --lossless, got {', '.join(named) or 'none'}"
            )
        if self.speed is not None and named == ["--max-kl"]:
            raise BudgetError("--max-kl and --speed do not go together; limit one of them, or bytes and --speed")
        for name, value in {**limits, "--speed": self.speed}.items():
            if value is not None and (not math.isfinite(value) or value < 0 or (value == 0 and name != "--max-kl")):
                raise BudgetError(f"{name} {value} is not a budget; give a positive number")


def parse_size(text: str | float) -> int:
    """'2.5GB', '800 MiB', '1e9', 10**9 -> bytes. kB, MB and GB are powers of 1000; KiB, MiB and GiB of 1024.

    Raises:
        BudgetError: it is anything else.
    """
    written = text if isinstance(text, str) else str(text)
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*", written)
    unit = _UNITS.get(match[2].lower()) if match else None
    size_bytes = float(match[1]) * unit if match and unit else math.inf
    if not math.isfinite(size_bytes):
        raise BudgetError(
            f"{text!r} is not a size; write bytes, or a number with kB, MB, GB, KiB, MiB or GiB, as in 2.5GB"
        )
    return round(size_bytes)


def parse_rate(text: str) -> float:
    """'0.5GB/s', '300MB/s' -> bytes per second.

    Raises:
        BudgetError: it is anything else.
    """
    size, slash, second = text.partition("/")
    try:
        rate = parse_size(size) if (slash, second.strip()) == ("/", "s") else 0
    except BudgetError:
        rate = 0
    if rate <= 0:
        raise BudgetError(f"{text!r} is no speed of storage; write it as in 0.5GB/s, or measured")
    return float(rate)


def format_size(size_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if size_bytes < 999.95:  # else four digits would show it as 1000
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} GB"
