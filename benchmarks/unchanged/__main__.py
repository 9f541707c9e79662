"""Did a change that should change nothing change anything? Run it before and after moving code about.

    python -m benchmarks.unchanged --save before.json [--quick]       on the commit before
    python -m benchmarks.unchanged --against before.json [--quick]    on the commit after; 1 if anything differs

    small models ──plan, pack──► artifacts ──copies──► sealed, damaged ──every command──► what it wrote and said
                                     │                                                         │
                                     └── sha256 of each file          before.json ◄──compare───┴── logits, texts

It runs the real command line, in an empty folder, without network, on one thread, and knows waterfill by that and by
the public names of `import waterfill` (worker.py) only. So it is the same program on both sides. What is run
is listed in cases.py. Recorded are the digest of every file that was written, and the exit status, standard
output and standard error of every command, but for what no two runs share (`PLACEHOLDERS`): times, rates, dates, and
memory that a process happens to take.

Every command is a process. Most are forks of one that has imported torch and transformers, which would take longer than
the commands themselves; a command of each kind starts from nothing (`Case.own`).

Both runs want the same machine and the same versions of torch and transformers: sums of floats depend on them.
`--quick` runs a part; it may be compared with what a full run has saved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.unchanged import cases
from benchmarks.unchanged.cases import Case

HERE = Path(__file__).resolve().parent

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
PLACEHOLDERS = (
    (rf"\bin (?:{NUMBER} (?:ms|s|min|h)\b ?)+", "in <time>"),
    (rf"first after {NUMBER} s(?:, then {NUMBER} per second)?", "first after <time>, then <rate>"),
    (rf"{NUMBER} (?:bytes|[kMG]B)/s", "<rate>"),
    (rf'"(\w+_s|tokens_per_second)": ?(?:{NUMBER}|null)', r'"\1": <time>'),
    (r"\b20\d\d-\d\d-\d\d\b", "<date>"),
    (rf"(?<=takes ){NUMBER} [kMG]B(?= at least)", "<memory>"),
    (r"(?m)^.* \d+ % \([\d,]+ of [\d,]+\)(?:, .* left| after .*)$\n", ""),  # of a command that took half a minute
    (r"(?m)^\w.*: .* so far$\n", ""),
    (r'(?m)^\{"event": "progress".*$\n', ""),  # how many there are depends on the time
)

BLURRED = (
    (rf"\b{NUMBER}", "#"),
    (r"\b(?:storage|decode|multiply|other)-bound", "<bound>"),
    (r"limited by \w+", "<limit>"),
)

Record = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------- run


def run_all(folder: Path, *, quick: bool, jobs: int) -> Record:
    """What every command said (`commands`), and the digests of what they wrote (`files`)."""
    record: Record = {"commands": {}, "files": {}}
    cases.lay_out(folder)
    servers: SimpleQueue[Server] = SimpleQueue()
    for number in range(jobs):
        servers.put(Server(folder, number))
    for stage in cases.stages(folder):
        chosen = [case for case in stage() if case.quick or not quick]
        names = [case.name for case in chosen]
        assert len({*names, *record["commands"]}) == len(names) + len(record["commands"]), "a case is there twice"
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda case: run(case, folder, servers), chosen))
        record["commands"] |= dict(zip(names, results, strict=True))
        print(f"{len(record['commands'])} commands after {time.monotonic() - BEGUN_S:.0f} s", file=sys.stderr)
    record["files"] = dict(digests(folder))
    for _ in range(jobs):
        servers.get().close()
    return record


class Server:
    """A process that runs one command at a time in a fork of itself (`serve` of the worker)."""

    def __init__(self, folder: Path, number: int) -> None:
        self._files = {name: str(folder / "served" / f"{name}-{number}") for name in ("typed", "out", "err")}
        (folder / "served").mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            command(("worker", "serve")),
            cwd=folder,
            env=environment(folder, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: list[str], environment: dict[str, str], typed: str) -> tuple[int, bytes, bytes]:
        Path(self._files["typed"]).write_text(typed)
        request = {"arguments": arguments, "environment": environment, **self._files}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        return status, Path(self._files["out"]).read_bytes(), Path(self._files["err"]).read_bytes()

    def close(self) -> None:
        self._process.communicate()


def run(case: Case, folder: Path, servers: SimpleQueue[Server]) -> Record:
    """One command, in `folder`, with a cache of its own unless the case names one."""
    cache = folder / "caches" / (case.cache or hashlib.sha256(case.name.encode()).hexdigest()[:12])
    began_s = time.monotonic()
    settings = environment(folder, cache) | case.environment
    if case.forked:
        server = servers.get()
        status, *streams = server.run(command(case.arguments), settings, case.typed)
        servers.put(server)
    else:
        ended = subprocess.run(
            command(case.arguments), cwd=folder, env=settings, input=case.typed.encode(), capture_output=True
        )
        status, *streams = ended.returncode, ended.stdout, ended.stderr
    passed_s = time.monotonic() - began_s
    if VERBOSE:
        print(f"{passed_s:6.1f} s  {case.name}", file=sys.stderr)
    out, err = (stream.decode(errors="backslashreplace") for stream in streams)
    if case.shape:
        out = json.dumps(shape(json.loads(out)), indent=1)
    return {
        "status": status,
        "out": normal(out, folder, blur=case.blur).splitlines(),
        "err": normal(err, folder, blur=case.blur).splitlines(),
    }


def command(arguments: tuple[str, ...]) -> list[str]:
    """`waterfill` of this environment; `python -m waterfill` and the worker are written with another first word."""
    first, *rest = arguments
    if first == "worker":
        return [sys.executable, str(HERE / "worker.py"), *rest]
    if first == "python":
        return [sys.executable, *rest]
    return [str(Path(sys.executable).with_name("waterfill")), *arguments]


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """Nothing of the caller's but where programs and libraries are."""
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "WATERFILL_CACHE": str(cache),
    }


# -------------------------------------------------------------------------------------------------------------- record


def normal(text: str, folder: Path, *, blur: bool = False) -> str:
    text = text.replace(str(folder), "<folder>").replace(sys.prefix, "<environment>")
    for pattern, placeholder in PLACEHOLDERS + (BLURRED if blur else ()):
        text = re.sub(pattern, placeholder, text)
    return text


def shape(value: Any) -> Any:
    """Of JSON: the names of its fields, and the types of what they hold."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def digests(folder: Path) -> Iterable[tuple[str, str]]:
    """Of all files there, by path; of pages and predictions after placeholders."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.split("/")[0] in ("hub", "caches", "served") and not name.startswith("caches/shared/"):
            continue
        data = path.read_bytes()
        if path.suffix in (".html", ".json") and not name.startswith("damaged"):
            data = normal(data.decode(), folder).encode()
        yield name, hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------------------- compare


def differences(before: Record, after: Record, *, part: bool) -> list[str]:
    """One entry per file or command that is not the same; `part`: `after` need not have all of them."""
    found = []
    for kind in ("files", "commands"):
        for name in sorted({*before[kind], *after[kind]}):
            old, new = before[kind].get(name), after[kind].get(name)
            if old == new or (part and new is None):
                continue
            if old is None or new is None:
                found.append(f"{kind}: {name}: only {'before' if new is None else 'after'}")
            else:
                found.append(f"{kind}: {name}: " + ("other bytes" if kind == "files" else first_difference(old, new)))
    return found


def first_difference(old: Record, new: Record) -> str:
    if old["status"] != new["status"]:
        return (
            f"exit status {old['status']} before, {new['status']} after: {(new['err'] or ['nothing said'])[-1][:300]}"
        )
    for stream in ("out", "err"):
        lines = max(len(old[stream]), len(new[stream]))
        for number in range(lines):
            pair = [record[stream][number] if number < len(record[stream]) else None for record in (old, new)]
            if pair[0] != pair[1]:
                was, now = around(*pair)
                return f"std{stream}, line {number + 1}\n    before: {was}\n    after:  {now}"
    return "nothing that is shown"


def around(was: str | None, now: str | None) -> tuple[str, str]:
    """Of two long lines, where they part."""
    if was is None or now is None:
        return str(was)[:200], str(now)[:200]
    equal = next((place for place, pair in enumerate(zip(was, now, strict=False)) if len({*pair}) > 1), len(was))
    start = max(0, equal - 40)
    return was[start : start + 200], now[start : start + 200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with what an earlier run wrote")
    parser.add_argument("--quick", action="store_true", help="a part of it")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (2)")
    parser.add_argument("--verbose", action="store_true", help="how long each command takes")
    parser.add_argument("--keep", action="store_true", help="keep the folder, and say where it is")
    options = parser.parse_args()
    if options.save is None and options.against is None:
        parser.error("give --save FILE, --against FILE or both")
    global VERBOSE
    VERBOSE = options.verbose
    folder = Path(tempfile.mkdtemp(prefix="unchanged-")).resolve()
    try:
        after = run_all(folder, quick=options.quick, jobs=options.jobs)
    finally:
        if options.keep:
            print(f"kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    if options.save is not None:
        options.save.write_text(json.dumps(after, indent=1, sort_keys=True))
    files, commands = len(after["files"]), len(after["commands"])
    artifacts = sum(name.endswith("/waterfill.json") and not name.startswith("damaged") for name in after["files"])
    counts = f"{artifacts} artifacts, {files} files, {commands} commands"
    if options.against is None:
        print(f"saved: {counts}; {time.monotonic() - BEGUN_S:.0f} s")
        return 0
    found = differences(json.loads(options.against.read_text()), after, part=options.quick)
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        print(f"{len(found)} of them differ: {counts}; {time.monotonic() - BEGUN_S:.0f} s")
        return 1
    print(f"all equal: {counts}; {time.monotonic() - BEGUN_S:.0f} s")
    return 0


BEGUN_S = time.monotonic()
VERBOSE = False

if __name__ == "__main__":
    sys.exit(main())
