"""Does every causal family of the installed transformers pack, load, and compute what its decoded weights say?

Each family has a tiny model with its config class's own defaults in all but size (`tests/tiny_configs.py`). It is
planned, packed (losslessly, and at 5 bits per weight for storage and for memory), loaded, compared with a dense twin
that holds the decoded weights, made to generate, and streamed (`tests/family_check.py`). docs/families.md is made here:

    python -m benchmarks.families --write
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

import torch
import transformers

from benchmarks.shared.report import REPOSITORY, BenchmarkReport, parse_arguments
from tests.support.family_check import BITS, FAMILIES, TOLERANCE, Outcome, check

PAGE = REPOSITORY / "docs" / "families.md"
STATUSES = ("passed", "failed", "refused", "not built")
QUICK = 8  # families
LITTLE = 0.9  # of the weights: a family of which less is packed is listed

INTRODUCTION = """\
# Families

The {families} causal families of transformers {transformers} (`MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`), as
`python -m benchmarks.families --write` found them with torch {torch}. Each is a tiny model with random weights and its
config class's own defaults in all but size.

{counts}
*Passed*: planned, packed, loaded, and

- lossless: every tensor and all logits equal the original's to the bit;
- at {bits:g} bits per weight, for storage and for memory: logits equal those of a dense twin that holds the decoded
  weights, float32, within {tolerance:g} of their standard deviation, and greedy generation writes the same tokens;
- streamed: the same as resident.

*Refused*: planning says in a sentence why the model cannot be packed. *Not built*: transformers cannot make a model of
the class's defaults, or not run it on tokens alone.
{others}
## Passed

{passed}

Vectors, convolutions, and what the model's code uses otherwise than in a product stay as they are. At least
{little_share:.0%} of the weights of these tiny models, in which convolutions weigh more than in real ones, are packed,
except in

{little}
What was said on the way, where anything was:

{notes}"""


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        write={"action": "store_true", "help": f"write {PAGE.relative_to(REPOSITORY)}"},
        jobs={"type": int, "default": 1, "help": "processes, with a thread each"},
        only={"nargs": "*", "default": FAMILIES, "help": "families"},
    )
    report = BenchmarkReport("every causal family")
    chosen = list(arguments.only)[: QUICK if arguments.quick else None]
    outcomes = []
    for outcome in _outcomes(chosen, arguments.jobs):
        outcomes.append(outcome)
        print(f"{len(outcomes):3}/{len(chosen)} {outcome.family}: {outcome.status} {outcome.stage}", file=sys.stderr)
    counts = Counter(outcome.status for outcome in outcomes)
    report.table("families", ["outcome", "families"], sorted(counts.items()), key="counts")
    report.table(
        "not passed",
        ["family", "outcome", "stage", "reason"],
        [[o.family, o.status, o.stage, o.reason[:200]] for o in outcomes if o.status != "passed"],
        key="not_passed",
    )
    report.criterion("no_family_fails", counts["failed"], "= 0", counts["failed"] == 0)
    if arguments.write:
        PAGE.write_text(_page(outcomes), encoding="utf-8")
    report.save(arguments.json)


def _outcomes(chosen: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """In the order of `chosen`."""
    with multiprocessing.get_context("spawn").Pool(jobs, _prepare, maxtasksperchild=50) as pool:
        yield from pool.imap(_check, chosen)


def _prepare() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def _check(family: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WATERFILL_CACHE"] = folder
        outcome = check(family, Path(folder))
        outcome.reason = outcome.reason.replace(folder, "…")
        return outcome


def _page(outcomes: Sequence[Outcome]) -> str:
    by_status = {status: [o for o in outcomes if o.status == status] for status in STATUSES}
    passed = by_status["passed"]
    little = sorted((o for o in passed if o.packed_share < LITTLE), key=lambda o: o.packed_share)
    return INTRODUCTION.format(
        families=len(outcomes),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        bits=BITS,
        tolerance=TOLERANCE,
        counts=_table(("outcome", "families"), [(status, len(some)) for status, some in by_status.items()]),
        others="".join(
            f"\n## {status.capitalize()}\n\n"
            + _table(("family", "stage", "why"), [(o.family, o.stage, o.reason) for o in by_status[status]])
            for status in STATUSES[1:]
            if by_status[status]
        ),
        little_share=LITTLE,
        little=_table(("family", "packed"), [(o.family, f"{o.packed_share:.0%}") for o in little]),
        notes=_table(("family", "what"), [(o.family, note) for o in passed for note in o.notes]),
        passed=fill(", ".join(outcome.family for outcome in passed) + ".", 118, break_on_hyphens=False),
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(str(value)) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
