"""Plans of real checkpoints from scratch: seconds, memory, sequences; how they get better with sequences, and hold.

checkpoint ──► waterfill plan, in an empty cache ──► time, peak, sequences    again ──► time without measuring
           ──► sensitivities of many sequences ──► subsets of 1, 2, 4, … passes ──► excess loss of plans made of them
           ──► plans from what was measured ──► packed ──► predicted KL beside that measured on texts
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import waterfill
from benchmarks.shared.processes import take
from benchmarks.shared.report import BenchmarkReport
from waterfill.base.cache import VARIABLE
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.model_calls import read
from waterfill.files.original import load_checkpoint
from waterfill.planning.measuring import measured_tokens
from waterfill.planning.options import ProbeOptions
from waterfill.planning.plan import Plan
from waterfill.planning.probe import MOST_SEQUENCES, lead_of
from waterfill.planning.sensitivity import Sensitivity
from waterfill.studies.own_text import OwnText

BITS = 4.0
SEQUENCES, QUICK_SEQUENCES = 48, 16  # of the curve
RATES, QUICK_RATES = (2.5, 3.0, 4.0, 5.0), (4.0,)  # of promises, bits
CONTEXT, WINDOWS, QUICK_WINDOWS = 512, 12, 4
OWN, UNSEEN = "its own", 24  # sequences of own text to measure promises on
QUICK_GOAL_S = 20.0  # of --quick, for 135 million weights
DRAWS = 200  # subsets per point of the curve
GOAL_S = {0.2: 90.0, 0.8: 240.0, 2.0: 720.0}  # by billions of weights, up to
GOAL_BYTES = {0.2: 1.5e9, 0.8: 2.5e9, 2.0: 4e9}

Floats = npt.NDArray[np.float64]


def measure_checkpoints(
    report: BenchmarkReport, models: list[Path], larger: list[Path], texts: list[Path], quick: bool
) -> None:
    """A row per checkpoint; a curve and promises of each that is not among the `larger` ones."""
    rows, curves, promises = [], [], []
    for model in models:
        with tempfile.TemporaryDirectory() as folder, _kept_in(Path(folder)):
            rows.append(_plan_row(report, model, Path(folder)))
            measured = waterfill.sensitivity(model, sequences=QUICK_SEQUENCES if quick else SEQUENCES)
            curves += _curve(model, measured)
            promises += _promises(model, measured, texts, quick)
    for model in larger:
        with tempfile.TemporaryDirectory() as folder, _kept_in(Path(folder)):
            rows.append(_plan_row(report, model, Path(folder)))
    columns = [
        "checkpoint",
        "billion weights",
        "s",
        "peak MB",
        "sequences measured, tried",
        "±",
        "s, measured before",
        "s, --quick",
    ]
    report.table(f"plans from scratch, {BITS:g} bits", [*columns, "predicted KL"], rows, key="plans")
    columns = ["checkpoint", "passes", "sequences", "excess loss %", "with pooling %", "error of the promise %"]
    report.table("what noise of sensitivities costs", columns, curves, key="curve")
    columns = ["checkpoint", "bits", "text", "predicted KL", "± ", "measured KL", "±", "predicted / measured"]
    columns.append(f"by sums over {QUICK_SEQUENCES if quick else SEQUENCES} sequences")
    report.table(f"promises, windows of {CONTEXT} tokens", columns, promises, key="promises")


def _promises(model: Path, measured: Sensitivity, texts: list[Path], quick: bool) -> list[list[Any]]:
    """Predicted beside measured KL: of plans as they are made, and what sensitivities of many sequences add up to."""
    rows, windows, checkpoint = [], QUICK_WINDOWS if quick else WINDOWS, open_checkpoint(model)
    own = _unseen(model)
    original = load_checkpoint(checkpoint)
    for bits in QUICK_RATES if quick else RATES:
        plan, summed = waterfill.plan(model, bits=bits), waterfill.plan(model, bits=bits, sensitivity=measured)
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / "packed"
            waterfill.pack(model, packed, plan=plan)
            losses = {OWN: _loss_on(own, original, packed)}
            for text in texts:
                loss = waterfill.evaluate(packed, model, text, context=CONTEXT, max_windows=windows)
                assert loss.kl is not None
                assert loss.kl_stderr is not None
                losses[text.name] = loss.kl, loss.kl_stderr
        predicted = plan.predicted
        for name, (kl, stderr) in losses.items():
            figures = (round(figure, 5) for figure in (predicted.kl, predicted.sampling_error, kl, stderr))
            ratios = (round(each / kl, 3) for each in (predicted.kl, summed.predicted.kl))
            rows.append([model.name, bits, name, *figures, *ratios])
    return rows


def _unseen(model: Path) -> torch.Tensor:
    """Own text that no plan has seen, int64 `[sequences, length]`."""
    checkpoint = open_checkpoint(model)
    architecture = describe(checkpoint)
    options: ProbeOptions = {"sequences": MOST_SEQUENCES + UNSEEN}
    with OwnText(checkpoint, architecture) as text:
        return measured_tokens(checkpoint, architecture, None, options, write=text.sample)[MOST_SEQUENCES:]


def _loss_on(tokens: torch.Tensor, original: Any, artifact: Path) -> tuple[float, float]:
    """KL of a packed model behind the tokens that are context for a probe, too, and its standard error."""
    packed, lead, losses = waterfill.load(artifact, dtype=original.dtype), lead_of(tokens.shape[1]), []
    with torch.no_grad():
        for sequence in tokens:
            p, q = (read(m, sequence[None])[0, lead:-1].float().log_softmax(-1) for m in (original, packed))
            losses.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return float(np.mean(losses)), float(np.std(losses, ddof=1) / math.sqrt(len(losses)))


@dataclass(frozen=True)
class _Run:
    plan: Plan
    seconds: float
    peak_bytes: int


@contextmanager
def _kept_in(cache: Path) -> Iterator[None]:
    """Use this cache here and in processes started meanwhile: what one of them measured, no other measures again."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(cache)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def _run(model: Path, folder: Path, *options: str) -> _Run:
    """`waterfill plan` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "waterfill",
        "plan",
        str(model),
        "--bits",
        str(BITS),
        "--save",
        str(folder / "plan.json"),
    ]
    taken = take([*command, *options])
    return _Run(Plan.load(folder / "plan.json"), *taken)


def _plan_row(report: BenchmarkReport, model: Path, folder: Path) -> list[Any]:
    first = _run(model, folder)
    again = _run(model, folder)
    quickly = _run(model, folder, "--quick", "--no-cache")
    if again.plan != first.plan:
        raise SystemExit("the plan of kept measurements is not that of the measurements")
    billions = sum(tensor.weights for tensor in first.plan.tensors) / 1e9
    predicted = first.plan.predicted
    share = predicted.sampling_error / predicted.kl
    for what, value, goals in (("s", first.seconds, GOAL_S), ("peak_bytes", first.peak_bytes, GOAL_BYTES)):
        goal = next((goal for size, goal in goals.items() if billions <= size), math.inf)
        report.criterion(f"{model.name}_{what}", round(value, 1), f"<= {goal:g}", value <= goal)
    if billions <= min(GOAL_S):
        seconds = round(quickly.seconds, 1)
        report.criterion(f"{model.name}_quick_s", seconds, f"<= {QUICK_GOAL_S:g}", seconds <= QUICK_GOAL_S)
    report.criterion(f"{model.name}_known_to", round(share, 3), "<= 0.1", share <= 0.1)
    sequences = f"{first.plan.probe['sequences']}, {predicted.tried}"
    times = round(first.seconds, 1), round(first.peak_bytes / 1e6), sequences, f"{share:.1%}"
    others = round(again.seconds, 1), round(quickly.seconds, 1)
    return [model.name, round(billions, 3), *times, *others, round(predicted.kl, 5)]


def _curve(model: Path, measured: Sensitivity) -> list[list[Any]]:
    """Excess loss, in per cent of the least, of allocations by the mean of some passes; that of all is the truth."""
    names, sizes = _sizes(model, measured)
    assert measured.samples is not None
    samples = np.array([measured.samples[name].alpha for name in names]).T
    count, sequences = len(samples), int(measured.probe["sequences"] or 0)
    truth, draw = samples.mean(0), np.random.default_rng(0)
    kinds = _kinds(names)
    rows = []
    for n in (2**k for k in range(int(math.log2(count)))):
        plain, pooled, promise = [], [], []
        for _ in range(DRAWS):
            some = samples[draw.choice(count, n, replace=False)]
            plain.append(_excess(some.mean(0), truth, sizes))
            pooled.append(_excess(_pooled(some, kinds), truth, sizes))
            promise.append(np.sum(sizes * some.mean(0) / truth) / sizes.sum() - 1)
        error = 100 * float(np.sqrt(np.mean(np.square(promise))))
        rows.append(
            [
                model.name,
                n,
                n * sequences // count,
                *(round(100 * float(np.mean(v)), 2) for v in (plain, pooled)),
                round(error, 1),
            ]
        )
    return rows


def _sizes(model: Path, measured: Sensitivity) -> tuple[list[str], Floats]:
    plan = waterfill.plan(model, bits=BITS, sensitivity=measured)
    sizes = {tensor.name: float(tensor.weights) for tensor in plan.tensors if measured.tensors[tensor.name].alpha > 0}
    return list(sizes), np.array(list(sizes.values()))


def _excess(alpha: Floats, truth: Floats, sizes: Floats) -> float:
    """Of reverse water-filling by `alpha`, where t² is 4^-rate: every weight then is planned to lose the same."""
    alpha = np.maximum(alpha, 1e-12)

    def loss(by: Floats) -> float:
        level = np.exp(np.sum(sizes * np.log(by / sizes)) / sizes.sum())
        return float(level * np.sum(truth * sizes / by))

    return loss(alpha) / loss(truth) - 1


def _kinds(names: list[str]) -> list[list[int]]:
    """Matrices whose names differ in numbers only."""
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(i)
    return [members for members in kinds.values() if len(members) > 3]


def _pooled(samples: Floats, kinds: list[list[int]]) -> Floats:
    """Means shrunk towards the trend over depth of like matrices, as far as their spread is that of noise
    (James-Stein); a kind's sum stays."""
    alpha = samples.mean(0)
    if len(samples) < 2:
        return alpha
    pooled = alpha.copy()
    for members in kinds:
        mean = np.maximum(alpha[members], 1e-12)
        noise = float(np.mean(samples[:, members].var(0, ddof=1) / len(samples) / mean**2))
        depth, log = np.arange(len(members)), np.log(mean)
        trend = np.polyval(np.polyfit(depth, log, 1), depth)
        between = max(0.0, float(np.mean((log - trend) ** 2)) - noise)
        shrunk = np.exp(trend + between / (between + noise) * (log - trend))
        pooled[members] = shrunk * mean.sum() / shrunk.sum()
    return pooled
