"""Where anything is kept that could be made again: predictions of originals, results of comparisons."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "WATERFILL_CACHE"


def cache_folder() -> Path:
    """WATERFILL_CACHE, or `waterfill` in the user's cache folder; it need not exist."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waterfill"
