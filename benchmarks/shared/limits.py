"""Commands under limits from outside: memory, and bytes a second that they may read from a disk (cgroups v1 and v2).

    run_limited(command, Limits(memory_bytes=…, read_bytes_per_s=…, disk=PATH), request={…})
        own groups below this process's ──► a shell joins them and becomes the command ──► Outcome
                                            a thread samples its memory meanwhile

The kernel holds the memory limit against anonymous memory and the page cache that the command fills; pages of libraries
that others have already read are theirs. The command's resident memory (VmHWM) counts those too, so both are reported.
Where groups cannot be made, `enforcement` says why in a sentence, and commands run without limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]

MOUNT = Path("/sys/fs/cgroup")
CONTROLLERS = {"memory": "memory", "read": "blkio"}  # what is limited: its controller in v1
CONTROLLERS_V2 = {"memory": "memory", "read": "io"}
JOIN = 'for group in $GROUPS_TO_JOIN; do echo $$ > "$group/cgroup.procs" || exit 125; done; exec "$@"'
SAMPLE_S = 0.02
PATIENCE_S = 5.0  # for a group to be empty once its command has ended


def with_source(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for interpreters that need not have this package: they find it here."""
    return {**environment, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), *_path(environment)])}


def _path(environment: Mapping[str, str]) -> list[str]:
    return [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []


class LimitError(Exception):
    """Limits cannot be enforced here, or a command did not answer; the sentence says why."""


@dataclass(frozen=True)
class Limits:
    """What a command may use; None is without limit."""

    memory_bytes: int | None = None
    read_bytes_per_s: float | None = None
    disk: Path | None = None  # any path on the disk whose reads are limited


@dataclass
class Peaks:
    """Memory of a command, bytes."""

    resident: int = 0  # VmHWM, libraries included
    anonymous: int = 0  # sampled
    file: int = 0  # mapped, sampled
    group: int | None = None  # charged to its group at most, page cache included
    group_anonymous: int | None = None  # sampled


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    elapsed_s: float
    killed: bool  # for want of memory
    timed_out: bool
    peaks: Peaks

    def answer(self) -> dict[str, Any]:
        """The JSON object in the last line that was printed; LimitError with the last words if there is none."""
        with contextlib.suppress(ValueError, IndexError):
            content = json.loads(self.stdout.strip().splitlines()[-1])
            if isinstance(content, dict):
                return content
        said = self.stderr.strip().splitlines()
        if self.killed:
            raise LimitError("the process was killed at its memory limit")
        if self.timed_out:
            raise LimitError(f"the process had not ended after {self.elapsed_s:.0f} s")
        raise LimitError(f"the process ended with status {self.status}" + (f": {said[-1]}" if said else ""))


def run_limited(
    command: Sequence[str],
    limits: Limits,
    *,
    request: Any = None,
    env: dict[str, str] | None = None,
    timeout_s: float | None = None,
) -> Outcome:
    """Run a command to its end with `request` as JSON on its standard input. A command past its time is killed.

    Raises LimitError where the limits cannot be enforced; ask `enforcement` before.
    """
    with _groups(limits) as groups:
        peaks = Peaks()
        environment = {**(os.environ if env is None else env), "GROUPS_TO_JOIN": " ".join(map(str, groups.values()))}
        start = time.perf_counter()
        process = subprocess.Popen(
            ["sh", "-c", JOIN, "sh", *command],
            cwd=REPOSITORY,  # where `-m benchmarks.…` is found
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, groups.get("memory"), peaks, done))
        watcher.start()
        timed_out = False
        try:
            stdout, stderr = process.communicate(json.dumps(request), timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
            stdout, stderr = process.communicate()
        finally:
            process.kill()  # what an interrupt leaves
            done.set()
            watcher.join()
        elapsed_s = time.perf_counter() - start
        killed = "memory" in groups and _was_killed(groups["memory"])
        if "memory" in groups:
            peaks.group = _first_number(groups["memory"], "memory.max_usage_in_bytes", "memory.peak")
    return Outcome(process.returncode, stdout, stderr, elapsed_s, killed, timed_out, peaks)


@lru_cache(maxsize=8)
def enforcement(disk: Path) -> dict[str, str | None]:
    """{"memory" and "read": None where that limit can be enforced, else a sentence that says why not}."""
    reasons: dict[str, str | None] = {}
    for what, limits in {"memory": Limits(memory_bytes=1 << 30), "read": Limits(None, 1e9, disk)}.items():
        try:
            with _groups(limits):
                reasons[what] = None
        except LimitError as error:
            reasons[what] = str(error)
    return reasons


def process_memory(process: int | str | None) -> dict[str, int]:
    """The memory figures of /proc/PID/status, in bytes; none once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(value) for name, value, _ in fields}


def evict(path: Path) -> None:
    """Drop a file, or all files below a folder, from the page cache, so that the next reader reads from disk."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------------
# Groups


@dataclass
class _Made:
    folders: list[Path] = field(default_factory=list)

    def make(self, parent: Path) -> Path:
        folder = parent / f"waterfill-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        folder.mkdir()
        self.folders.append(folder)
        return folder

    def remove(self) -> None:
        """Groups can be removed once the last process in them is gone, a moment after its end."""
        for folder in self.folders:
            deadline = time.monotonic() + PATIENCE_S
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(SAMPLE_S)


@contextlib.contextmanager
def _groups(limits: Limits) -> Iterator[dict[str, Path]]:
    """{"memory", "read": a fresh group with that limit}, as far as limits are given; the same one twice in v2."""
    made, groups = _Made(), {}
    wanted = {"memory": limits.memory_bytes, "read": limits.read_bytes_per_s}
    try:
        for what, limit in wanted.items():
            if limit is not None:
                try:
                    groups[what] = _group(what, limit, limits.disk, made)
                except OSError as error:
                    raise LimitError(
                        f"no {what} limit: {error.strerror or error} in {error.filename or MOUNT}; "
                        "run as root, or where a control group is delegated to you"
                    ) from None
        yield groups
    finally:
        made.remove()


def _group(what: str, limit: float, disk: Path | None, made: _Made) -> Path:
    device = _block_device(disk) if what == "read" else ""
    first = MOUNT / CONTROLLERS[what]
    if first.is_dir():
        group = made.make(_own_group(first, CONTROLLERS[what]))
        if what == "memory":
            (group / "memory.limit_in_bytes").write_text(f"{int(limit)}\n")
        else:
            (group / "blkio.throttle.read_bps_device").write_text(f"{device} {int(limit)}\n")
        return group
    group = next(iter(made.folders), None) or made.make(_parent_v2())
    if what == "memory":
        (group / "memory.max").write_text(f"{int(limit)}\n")
    else:
        (group / "io.max").write_text(f"{device} rbps={int(limit)}\n")
    return group


def _own_group(mount: Path, controller: str) -> Path:
    """The group of this process below a mount; the mount itself where a container hides the way to it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            own = mount / path.lstrip("/")
            return own if own.is_dir() else mount
    return mount


def _parent_v2() -> Path:
    """The nearest group above this process whose children may be limited; one that holds processes may not be it."""
    mount = MOUNT if (MOUNT / "cgroup.controllers").is_file() else MOUNT / "unified"
    folder = _own_group(mount, "")
    while True:
        control = folder / "cgroup.subtree_control"
        missing = set(CONTROLLERS_V2.values()) - set(control.read_text().split() if control.is_file() else ())
        if not missing:
            return folder
        with contextlib.suppress(OSError):
            control.write_text(" ".join(f"+{name}" for name in sorted(missing)))
            return folder
        if folder == mount:
            raise LimitError(
                "no limits: control groups with memory and io cannot be made here; run as root outside a container"
            )
        folder = folder.parent


def _block_device(path: Path | None) -> str:
    """MAJOR:MINOR of the whole disk that holds a path."""
    if path is None:
        raise LimitError("no read limit: no disk was named whose reads are to be limited")
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    node = Path("/sys/dev/block") / number
    if not node.exists():
        raise LimitError("no read limit: the folder lies on no block device of its own; give --folder on a disk")
    if (node / "partition").exists():
        number = (node.resolve().parent / "dev").read_text().strip()
    return number


def _was_killed(group: Path) -> bool:
    for name in ("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            fields = dict(line.split() for line in (group / name).read_text().splitlines())
            return int(fields.get("oom_kill", 0)) > 0
    return False


def _first_number(group: Path, *names: str) -> int | None:
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text())
    return None


def _watch(process: int, group: Path | None, peaks: Peaks, done: threading.Event) -> None:
    while not done.wait(SAMPLE_S):
        status = process_memory(process)
        peaks.resident = max(peaks.resident, status.get("VmHWM", 0))
        peaks.anonymous = max(peaks.anonymous, status.get("RssAnon", 0))
        peaks.file = max(peaks.file, status.get("RssFile", 0))
        if group is not None:
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                anonymous = int(fields.get("anon", fields.get("rss", 0)))
                peaks.group_anonymous = max(peaks.group_anonymous or 0, anonymous)
