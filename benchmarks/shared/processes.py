"""Commands in processes of their own: what they took."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# A process begins with the peak of the one that started it, so a small one stands between.
_BETWEEN = """
import resource, subprocess, sys, time
start_s = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(code, time.perf_counter() - start_s, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Taken(NamedTuple):
    """By a command."""

    seconds: float
    peak_bytes: int  # of resident memory


def take(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Taken:
    """Run a command to its end, without its output. Linux only.

    Raises:
        SystemExit: it failed.
    """
    between = subprocess.run(
        [sys.executable, "-c", _BETWEEN, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    code, seconds, peak_bytes = between.stdout.split()
    if int(code):
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return Taken(float(seconds), int(peak_bytes))
