"""Peak memory of a process, beside the limit that it was given and beside the file that it loads.

    limits   everything that takes `--memory`: random weights, with keys and values that a long text makes as large as
             the weights. Each row is a command in a process of its own, which says its VmHWM at the end; where a limit
             is refused, the sentence says what would do, and the next row tries that
    forms    weights of Llama-3.2-1B's shapes at 3 bits, entropy-coded, as levels, as codes, and read from storage for
             every token: what the engine takes while it loads them, and tokens a second

A quick run has smaller models, and fewer rows. The model of the second part is kept in --folder: 3 GB, minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import waterfill
from benchmarks.shared.limits import Limits, run_limited
from benchmarks.shared.make_checkpoint import TINY, make_checkpoint
from benchmarks.shared.report import BenchmarkReport, held_out_text, median_spread, parse_arguments
from benchmarks.streaming.models import CODED, Store, even_sensitivity
from benchmarks.streaming.runs import StreamingBench

PARTS = ("limits", "forms")
SHAPES = TINY | {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 4096,
    "max_position_embeddings": 8192,
}
QUICK_SHAPES = SHAPES | {"num_hidden_layers": 4}
BITS, DRAFT_BITS = 4.0, 2.0
SHORT, LONG = 10, 1500  # tokens of a prompt, about
NEW_TOKENS = 8
TURNS = (10, 200, 600, 900)  # tokens of what is said in a conversation
STARTS = {"native": 62, "transformers": 340}  # MB that a process takes before the model; rows begin from here
SPARES = (60, 120, 240, 480)  # MB beyond that
TIMEOUT_S = 1200.0
# A command as the shell would run it, in a process that imports nothing else.
WORKER = """
import io, json, sys
request = json.load(sys.stdin)
sys.argv, sys.stdin = ["waterfill", *request["arguments"]], io.StringIO("\\n".join(request["lines"]))
out, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
status = 0
try:
    from waterfill.cli.main import main
    main()
except SystemExit as end:
    status = int(end.code or 0)
said = sys.stdout.getvalue() + sys.stderr.getvalue()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"status": status, "said": said, "peak_bytes": 1024 * peak}), file=out)
"""
SLACK_MEGABYTES = 8  # one process needs a little more than another
# How the weights are held, and what a worker is asked for that.
LEVELS, CODES, STORAGE = "levels", "codes", "storage"
FORMS: dict[str, dict[str, Any]] = {LEVELS: {"form": LEVELS}, CODES: {"form": CODES}, STORAGE: {"keep": False}}
FORM_GOAL = 1.15  # times the file
FORM_TOKENS, FORM_ROUNDS = 8, 3
REFUSED = re.compile(r"takes (\d+) MB at least")


@dataclass(frozen=True)
class Way:
    """A way to run a model: a command, and what is written to it."""

    name: str
    engine: str
    arguments: Sequence[str]
    lines: Sequence[str] = ()


def main() -> None:
    kept = Path(os.environ.get("WATERFILL_CACHE") or tempfile.gettempdir()) / "waterfill-streaming"
    arguments = parse_arguments(
        __doc__,
        part={"choices": PARTS, "nargs": "+", "default": list(PARTS), "help": f"of {', '.join(PARTS)}"},
        folder={
            "type": Path,
            "default": kept,
            "help": "where the model of `forms` is kept, as benchmarks.streaming does",
        },
    )
    report = BenchmarkReport("peak memory beside its limit")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WATERFILL_CACHE"] = str(Path(folder) / "cache")
        if "limits" in arguments.part:
            measure_limits(report, Path(folder), arguments)
    if "forms" in arguments.part:
        measure_forms(report, arguments)
    report.save(arguments.json)


def measure_limits(report: BenchmarkReport, folder: Path, arguments: Namespace) -> None:
    checkpoint = make_checkpoint(folder / "model", QUICK_SHAPES if arguments.quick else SHAPES)
    options: dict[str, Any] = {"uniform": True, "sensitivity": even_sensitivity(checkpoint)}
    waterfill.pack(checkpoint, folder / "packed", bits=BITS, **options)
    waterfill.pack(checkpoint, folder / "draft", bits=DRAFT_BITS, **options)
    text = held_out_text(report)
    rows, exceeded = [], 0
    for path in paths(folder, text):
        for megabytes in limits(path, quick=arguments.quick):
            row, smallest = tried(path, megabytes)
            rows.append(row)
            if smallest is not None and not arguments.quick:
                rows.append(tried(path, smallest + SLACK_MEGABYTES)[0])
    exceeded = sum(row[3] > row[2] for row in rows)
    report.table("peak and limit", ["command", "engine", "limit MB", "peak MB", "answer"], rows, key="peaks")
    report.criterion("limits_exceeded", exceeded, "0", exceeded == 0)


def measure_forms(report: BenchmarkReport, arguments: Namespace) -> None:
    """Rounds of one process per form; every process writes the same tokens."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    name = "tiny" if arguments.quick else "1b"
    bench = StreamingBench(report, Store(arguments.folder, report), arguments.quick, sys.executable, ["device"], "none")
    artifact = bench.store.artifact(name, CODED)
    rounds = [
        {form: bench.ours(artifact, None, FORM_TOKENS, None, **asked) for form, asked in FORMS.items()}
        for _ in range(1 if arguments.quick else FORM_ROUNDS)
    ]
    rows = []
    for form in FORMS:
        runs = [some[form] for some in rounds]
        peak = max(run.answer["load_bytes"] for run in runs)
        start = max(run.answer["start_bytes"] for run in runs)
        speed, spread = median_spread([1 / run.token_s for run in runs])
        beside = [
            median_spread([some[other].token_s / some[form].token_s for some in rounds])[0]
            for other in (LEVELS, STORAGE)
        ]
        sizes = [artifact.size_bytes / 1e6, start / 1e6, peak / 1e6, peak / artifact.size_bytes]
        rows.append([form, *sizes, speed, spread, *beside])
        if form == CODES and not arguments.quick:  # of a small file, the interpreter is a large part
            ratio = peak / artifact.size_bytes
            report.criterion("peak_over_file_of_codes", ratio, f"<= {FORM_GOAL}", ratio <= FORM_GOAL)
    texts = [run.answer["generations"][0]["ids"] for some in rounds for run in some.values()]
    same = all(text == texts[0] for text in texts)
    report.criterion("forms_write_the_same", same, "True", same)
    columns = ["form", "file MB", "before MB", "peak MB, loading", "of the file", "tokens/s", "±"]
    columns += ["times levels' speed", "times storage's speed"]
    report.table(f"{name}, weights in memory", columns, rows, key="forms")


def paths(folder: Path, text: Path) -> Iterator[Way]:
    packed = str(folder / "packed")
    common = ["--max-new-tokens", str(NEW_TOKENS), "--temperature", "0"]
    for engine in STARTS:
        generate = ["generate", packed, *common, "--engine", engine, "--prompt"]
        long = " x" * LONG
        yield Way("a short prompt", engine, [*generate, " x" * SHORT])
        yield Way("a long prompt", engine, [*generate, long])
        yield Way("a long prompt, looked up", engine, [*generate, long, "--lookup", "4"])
        yield Way("a long prompt, drafted", engine, [*generate, long, "--draft", str(folder / "draft")])
        chat = ["chat", packed, *common, "--engine", engine, "--json"]
        yield Way("a conversation", engine, chat, [" x" * tokens for tokens in TURNS])
    scored = ["eval", packed, "--text", str(text), "--windows", "2", "--no-cache", "--json", "--context"]
    yield Way("eval, windows of 256", "transformers", [*scored, "256"])
    yield Way("eval, windows of 1024", "transformers", [*scored, "1024"])
    against = ["eval", packed, "--against", str(folder / "model"), "--text", str(text), "--windows", "2", "--json"]
    yield Way("eval beside the original", "transformers", [*against, "--context", "256"])


def limits(path: Way, *, quick: bool) -> list[int]:
    return [STARTS[path.engine] + spare for spare in (SPARES[1:3] if quick else SPARES)]


def tried(path: Way, megabytes: int) -> tuple[list[Any], int | None]:
    """A row, and the memory that would do as a refusal has it."""
    shutil.rmtree(os.environ["WATERFILL_CACHE"], ignore_errors=True)  # the original's predictions
    request = {"arguments": [*path.arguments, "--memory", f"{megabytes}MB"], "lines": path.lines}
    outcome = run_limited([sys.executable, "-c", WORKER], Limits(), request=request, timeout_s=TIMEOUT_S)
    answer = outcome.answer()
    wanted = REFUSED.search(answer["said"]) if answer["status"] else None
    said = "" if answer["status"] == 0 else f"takes {wanted[1]} MB" if wanted else answer["said"][-80:]
    row = [path.name, path.engine, megabytes, round(answer["peak_bytes"] / 1e6, 1), said]
    return row, None if wanted is None else int(wanted[1])


if __name__ == "__main__":
    main()
