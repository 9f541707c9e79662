"""Memory of this process, how much of the machine's it may have, and on how many processors it may run."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import Any

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_MMAP_THRESHOLD = -3  # an option of glibc's mallopt
_LARGE_BYTES = 1 << 18
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" with a number near 2^63


def resident_bytes() -> int:
    """Resident memory of this process, shared libraries included; 0 where the system does not say."""
    try:
        return int((_PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def peak_bytes() -> int:
    """The most that was ever resident. VmHWM starts with the process, ru_maxrss with what its parent had."""
    try:
        lines = (_PROC / "self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def free_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float:
    """Memory that this process may still take: what the machine can spare, and what its cgroups leave of their limits.

    Pages of files, which the kernel gives up when asked, count as free. Infinite where nothing is known.
    """
    return min([_machine_bytes(proc), *_group_bytes(proc, cgroups)])


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release() -> None:
    """Give memory that was freed back to the system, as far as the C library does that."""
    if (trim := _c_function("malloc_trim")) is not None:
        trim(0)


def return_large_blocks() -> None:
    """From now on large blocks go back to the system when they are freed. glibc keeps ever larger ones for what comes
    next, which tensors that grow leave full of holes."""
    if (option := _c_function("mallopt")) is not None:
        option(_MMAP_THRESHOLD, _LARGE_BYTES)


def _c_function(name: str) -> Any:
    """Of the C library; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _machine_bytes(proc: Path) -> float:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return math.inf


def _group_bytes(proc: Path, cgroups: Path) -> list[float]:
    """What the limit of every cgroup around this process leaves, of version 2 and 1."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        if not folder.is_dir():  # in a container the path is the host's, and the mounted root is the group itself
            folder = root
        while True:
            free.append(_left(folder, *names))
            if folder == root:
                break
            folder = folder.parent
    return free


def _left(folder: Path, limit_name: str, usage_name: str, reclaimable: str) -> float:
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    if limit == "max" or int(limit) >= _UNLIMITED:
        return math.inf
    return max(0.0, int(limit) - usage + int(stats.get(reclaimable, 0)))
