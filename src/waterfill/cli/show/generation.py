"""What a generation took, for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from waterfill.running.text.sampling import GenerationStats


def generation_line(stats: GenerationStats) -> str:
    """What a generation took."""
    count = f"{stats.tokens} token{'' if stats.tokens == 1 else 's'}"
    if stats.tokens < 2:
        return count
    return f"{count}, first after {stats.first_token_s:.2f} s, then {stats.tokens_per_second:.1f} per second"


def generation_record(stats: GenerationStats) -> dict[str, Any]:
    """Counts and times of a generation."""
    return {**asdict(stats), "tokens_per_second": stats.tokens_per_second}
