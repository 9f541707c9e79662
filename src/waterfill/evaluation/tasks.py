"""Tasks through lm-evaluation-harness: any that it has, presets by dimension, and local ones (`local_tasks`).

names ──► task_specs ──► run_tasks(model, tokenizer, specs) ──► TaskResults: one score per task, metric and filter
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.records import Record, frame
from waterfill.evaluation.local_tasks import SUFFIX, read_task

EFFICIENCY = "efficiency"
PRESETS: Mapping[str, tuple[str, ...]] = {
    # The dimensions of "A Comprehensive Evaluation of Quantization Strategies" (arXiv 2402.16775), with the harness's
    # nearest where it does not have the benchmark: mnli for SNLI, ifeval for FollowBench, which needs a judge.
    "knowledge": ("mmlu", "ceval-valid", "flores", "cnn_dailymail", "xsum", "gsm8k", "mnli"),
    "alignment": ("truthfulqa_mc1", "truthfulqa_mc2", "bbq", "ifeval"),
    EFFICIENCY: (),  # is measured, not asked: `waterfill.evaluation.efficiency`
}
BOOTSTRAP = 1000  # resamplings for the standard errors that have no formula
SEED = 1234  # of few-shot examples: the harness's own
_COLUMNS = ("alias", "name", "sample_len", "sample_count", "samples")


@dataclass(frozen=True)
class TaskScore(Record):
    """One figure of one task."""

    task: str
    metric: str
    filter: str  # what was done to the answers first; "none" where nothing was
    value: float
    stderr: float | None
    higher_is_better: bool | None
    shots: int | None  # examples before each question; None of a group of tasks
    samples: int | None  # questions asked
    version: str | None  # of the task


@dataclass(frozen=True)
class TaskResults(Record):
    """What a model scored."""

    scores: tuple[TaskScore, ...]
    lm_eval: str  # version of the harness
    limit: int | None  # questions per task at most
    batch: int
    chat_template: bool
    seed: int

    def to_pandas(self) -> Any:
        """A pandas DataFrame, one row per score."""
        return frame(self.scores)


def names_of(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, presets and files, from a list of them or one text with commas."""
    parts = tasks.split(",") if isinstance(tasks, str) else [part for each in tasks for part in each.split(",")]
    return tuple(part.strip() for part in parts if part.strip())


def task_specs(names: Iterable[str]) -> list[str | dict[str, Any]]:
    """What the harness understands: names of its own tasks as they are, presets as theirs, files as configurations.

    Raises:
        WaterfillError: a file that holds no task, or two of one name.
    """
    specs: list[str | dict[str, Any]] = []
    for name in names:
        specs += [read_task(Path(name))] if name.endswith(SUFFIX) else PRESETS.get(name, (name,))
    called = [spec if isinstance(spec, str) else spec["task"] for spec in specs]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise WaterfillError(f"{', '.join(twice)} is asked for more than once; give each task a name of its own")
    return specs


def run_tasks(
    model: Any,
    tokenizer: Any,
    specs: Sequence[str | dict[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 1,
    chat_template: bool = False,
    journal: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> TaskResults:
    """Ask a loaded model, of transformers or `GgufModel`.

    Args:
        shots: examples before each question; the task's own number when None.
        limit: ask only the first questions of each task.
        chat_template: put questions into the tokenizer's chat template.
        journal: file for answers, so that an interrupted run continues; removed at the end.
        progress: called with (kind of request, done, in all).

    Raises:
        WaterfillError: the harness is missing, knows no such task, or cannot get its data.
    """
    lm_eval = _harness()
    from lm_eval.tasks import TaskManager

    from waterfill.evaluation.harness import harness_model, without_bars

    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise WaterfillError("a chat template was asked for, but the model's tokenizer has none; leave it out")
    own = [spec for spec in specs if isinstance(spec, str)]
    manager = TaskManager(include_defaults=bool(own))
    unknown = [name for name in own if not manager.match_tasks([name])]
    if unknown:
        raise WaterfillError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists those it has")
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
    try:
        with without_bars():
            results = lm_eval.simple_evaluate(
                model=harness_model(model, tokenizer, batch, progress),
                tasks=list(specs),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=chat_template,
                use_cache=None if journal is None else str(journal),
                fewshot_random_seed=SEED,
            )
    except ImportError as error:
        raise WaterfillError(f"a task needs more than is installed ({first_line(error)}); install it") from error
    except AssertionError as error:  # the harness's way to refuse
        raise WaterfillError(f"lm-eval refuses these tasks ({first_line(error)}); choose others") from error
    except OSError as error:  # what `datasets` raises for data that it cannot find or download
        raise WaterfillError(f"the data of a task cannot be had ({first_line(error)}); check the network") from error
    if journal is not None:
        for file in journal.parent.glob(f"{journal.name}*"):
            file.unlink()
    return TaskResults(
        scores=tuple(_scores(results)),
        lm_eval=metadata.version("lm_eval"),
        limit=limit,
        batch=batch,
        chat_template=chat_template,
        seed=SEED,
    )


def _scores(results: Mapping[str, Any]) -> Iterable[TaskScore]:
    for task, figures in {**results["results"], **results.get("groups", {})}.items():
        counts = results.get("n-samples", {}).get(task, {})
        version = results.get("versions", {}).get(task)
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if key in _COLUMNS or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=filtered or "none",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric),
                shots=results.get("n-shot", {}).get(task),
                samples=counts.get("effective"),
                version=None if version is None else str(version),
            )


def _harness() -> Any:
    """The package lm_eval, kept from talking."""
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface
    except ImportError as error:
        raise WaterfillError(
            f"tasks need lm-evaluation-harness ({error}); install the extra with pip install 'waterfill[eval]'"
        ) from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.evaluator.get_git_commit_hash = lambda: None  # of the user's folder; git complains where that has none
    return lm_eval
