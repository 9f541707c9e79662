"""What error feedback is worth at equal bytes: KL without it, calibrated on the model's own text, and on a text.

Each of --texts is halved: the first half calibrates, the second is measured on, and so are the other texts' second
halves. `own` is text that the model wrote, of another seed than what calibrates. Plans are allotted, for storage;
`embedding` says whether the input embedding, which has feedback only as a head, is packed as well or kept out of the
budget. A second table is of growing numbers of the model's own tokens, at one rate; a third of rates about one bit,
beside BiLLM at its true bits, for --low-models; a fourth of GPTQ and SliM-LLM, calibrated on as many own tokens, and
ours at their bytes, for --peer-models.

Takes minutes per plan and 100 million weights. With --quick, the example model at one rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import waterfill
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.files.architecture import describe
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_tokenizer
from waterfill.planning.calibration import TOKENS
from waterfill.planning.plan import Plan
from waterfill.planning.probe import LENGTH
from waterfill.studies.comparison import Row
from waterfill.studies.own_text import OwnText

RATES, QUICK_RATES = (2.0, 3.0, 4.0), (3.0,)  # bits
GROWTH, QUICK_GROWTH = (1024, 4096, 16384), (1024, 4096)  # tokens
GROWTH_BITS = 3.0
CONTEXT, WINDOWS, QUICK_WINDOWS = 512, 10, 6
LOW_RATES, QUICK_LOW_RATES = (0.9, 1.0, 1.1, 1.5, 2.0), (1.0,)  # bits
BILLM = ("billm", "billm-salience")
PEERS, QUICK_PEERS = ("gptq-2", "gptq-3", "slim-2", "slim-3"), ("gptq-3",)
PEER_GOAL = 0.5  # of a peer's KL at its bytes
OWN_SEQUENCES, OWN_SEED = 16, 1
SELF_GOAL, TEXT_GOAL = 0.45, 0.27  # of the KL without feedback
PREDICTED_FROM_BITS = 3.0
PREDICTED_GOAL = {"own": 0.15, "other": 0.25}  # relative error of the prediction


@dataclass(frozen=True)
class Bench:
    """A checkpoint, and the halves of texts."""

    model: Path
    folder: Path
    calibrating: dict[str, Path]
    measuring: dict[str, Path]
    windows: int

    def measure(self, bits: float, calibrate: str | Path | None, keep: Sequence[str], **options: Any) -> Result:
        """Plan, pack, and measure on every text."""
        packed, start_s = self.folder / "packed", time.perf_counter()
        options |= {"feedback": "none"} if calibrate is None else {"calibrate": calibrate}
        plan = waterfill.pack(self.model, packed, bits=bits, keep=keep, overwrite=True, **options)
        seconds = time.perf_counter() - start_s
        kl, ppl = {}, {}
        for name, text in self.measuring.items():
            loss = waterfill.evaluate(packed, self.model, text, context=CONTEXT, max_windows=self.windows)
            assert loss.kl is not None
            assert loss.ppl_reference is not None
            kl[name], ppl[name] = loss.kl, loss.ppl / loss.ppl_reference
        return Result(plan, kl, ppl, seconds)


@dataclass(frozen=True)
class Result:
    """A plan and what it lost, by text."""

    plan: Plan
    kl: dict[str, float]
    ppl: dict[str, float]  # of the original's
    seconds: float


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        models={"type": Path, "nargs": "*", "default": [EXAMPLE_MODEL], "help": "checkpoints to pack"},
        texts={"type": Path, "nargs": "*", "default": [], "help": "more files to calibrate and measure on"},
        rates={"type": float, "nargs": "*", "default": [], "help": "bits per weight (2 3 4)"},
        no_growth={"action": "store_true", "help": "leave out the table of growing numbers of tokens"},
        low_models={"type": Path, "nargs": "*", "default": [EXAMPLE_MODEL], "help": "checkpoints at about one bit"},
        peer_models={"type": Path, "nargs": "*", "default": [EXAMPLE_MODEL], "help": "checkpoints beside peers"},
    )
    report = BenchmarkReport("error feedback at equal bytes")
    texts = [held_out_text(report), *arguments.texts]
    rates = arguments.rates or (QUICK_RATES if arguments.quick else RATES)
    growth = () if arguments.no_growth else QUICK_GROWTH if arguments.quick else GROWTH
    rows: list[list[Any]] = []
    grown: list[list[Any]] = []
    low: list[list[Any]] = []
    beside: list[list[Any]] = []
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(model, Path(folder), texts, QUICK_WINDOWS if arguments.quick else WINDOWS)
            for bits in rates:
                rows += _at_equal_bytes(report, bench, bits, keep=())
                if (embedding := _embedding(model)) and not arguments.quick and bits == GROWTH_BITS:
                    rows += _at_equal_bytes(report, bench, bits, keep=(embedding,))
            grown += _grown(bench, growth)
    for model in arguments.low_models:
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(model, Path(folder), texts, QUICK_WINDOWS if arguments.quick else WINDOWS)
            low += _low(report, bench, QUICK_LOW_RATES if arguments.quick else LOW_RATES)
    for model in arguments.peer_models:
        with tempfile.TemporaryDirectory() as folder:
            bench = _bench(model, Path(folder), texts, QUICK_WINDOWS if arguments.quick else WINDOWS)
            beside += _beside(report, bench, QUICK_PEERS if arguments.quick else PEERS)
    texts_measured = list(bench.measuring)
    if rows:
        columns = ["checkpoint", "bits", "embedding", "calibrated on", "s", "predicted KL", *texts_measured]
        ratios = [f"{name}, of no feedback" for name in texts_measured]
        report.table("KL at equal bytes", [*columns, *ratios], rows, key="kl")
    if grown:
        columns = ["checkpoint", "bits", "own tokens", "predicted KL", *texts_measured]
        report.table("by tokens that calibrate", columns, grown, key="tokens")
    if low:
        columns = ["checkpoint", "method", "calibrated on", "bits", *texts_measured]
        report.table("about one bit", [*columns, *(f"{name}, perplexity" for name in texts_measured)], low, key="low")
    if beside:
        columns = ["checkpoint", "method", "bits", *texts_measured]
        ours = ["waterfill, predicted KL", *(f"waterfill, {name}" for name in texts_measured)]
        report.table("beside peers, at their bytes", [*columns, *ours], beside, key="peers")
    report.save(arguments.json)


def _bench(model: Path, folder: Path, texts: Sequence[Path], windows: int) -> Bench:
    calibrating: dict[str, Path] = {}
    measuring = {"own": _own(model, folder)}
    for text in texts:
        content = text.read_text(encoding="utf-8")
        for half, files in ((content[: len(content) // 2], calibrating), (content[len(content) // 2 :], measuring)):
            files[text.name] = folder / f"{len(files)}-{text.name}"
            files[text.name].write_text(half, encoding="utf-8")
    return Bench(model, folder, calibrating, measuring, windows)


def _own(model: Path, folder: Path) -> Path:
    """Text that the model writes."""
    checkpoint = open_checkpoint(model)
    with OwnText(checkpoint, describe(checkpoint)) as text:
        tokens = text.sample(range(OWN_SEQUENCES), CONTEXT, OWN_SEED)
    tokenizer = load_tokenizer(model)
    file = folder / "own.txt"
    file.write_text("\n".join(tokenizer.decode(some, skip_special_tokens=True) for some in tokens), encoding="utf-8")
    return file


def _embedding(model: Path) -> str | None:
    """Name of the input embedding, where it is packed."""
    matrices = describe(open_checkpoint(model)).matrices
    return next((matrix.name for matrix in matrices if matrix.role == "embedding"), None)


def _at_equal_bytes(report: BenchmarkReport, bench: Bench, bits: float, keep: Sequence[str]) -> list[list[Any]]:
    ways: dict[str, str | Path | None] = {"nothing": None, "own": "self"}
    if not keep:
        ways |= bench.calibrating
    results = {name: bench.measure(bits, on, keep) for name, on in ways.items()}
    rows, without = [], results["nothing"].kl
    embedding = "kept" if keep else "packed"
    for name, result in results.items():
        ratios = {text: kl / without[text] for text, kl in result.kl.items()}
        figures = [round(result.seconds, 1), round(result.plan.predicted.kl, 5)]
        losses = [*(round(kl, 5) for kl in result.kl.values()), *(round(ratio, 3) for ratio in ratios.values())]
        rows.append([bench.model.name, bits, embedding, name, *figures, *losses])
        if name == "nothing":
            continue
        key = f"{bench.model.name}_{bits:g}_{embedding}_by_{name}"
        for text, ratio in ratios.items():
            goal = TEXT_GOAL if text == name and name != "own" else SELF_GOAL
            report.criterion(f"{key}_on_{text}", round(ratio, 3), f"<= {goal}", ratio <= goal)
        if name == "own" and bits >= PREDICTED_FROM_BITS:
            for text, kl in result.kl.items():
                error = result.plan.predicted.kl / kl - 1
                goal = PREDICTED_GOAL["own" if text == "own" else "other"]
                report.criterion(f"{key}_predicted_on_{text}", round(error, 3), f"± {goal}", abs(error) <= goal)
    return rows


def _grown(bench: Bench, growth: Sequence[int]) -> list[list[Any]]:
    rows = []
    for tokens in growth:
        result = bench.measure(GROWTH_BITS, "self", (), calibration_tokens=tokens)
        kl = [round(each, 5) for each in result.kl.values()]
        rows.append([bench.model.name, GROWTH_BITS, tokens, round(result.plan.predicted.kl, 5), *kl])
    return rows


def _low(report: BenchmarkReport, bench: Bench, rates: Sequence[float]) -> list[list[Any]]:
    """Ours at low rates, BiLLM, and ours at BiLLM's own bits."""
    rows = []
    theirs = {name: _billm(bench, name) for name in BILLM}
    for bits in (*rates, max(row.bits or 0.0 for by_text in theirs.values() for row in by_text.values())):
        for name, on in (("nothing", None), ("own", "self")):
            result = bench.measure(bits, on, ())
            figures = [*(round(kl, 4) for kl in result.kl.values()), *(round(ppl, 3) for ppl in result.ppl.values())]
            rows.append([bench.model.name, "waterfill", name, round(result.plan.bits, 3), *figures])
    for name, by_text in theirs.items():
        bits = next(row.bits or 0.0 for row in by_text.values())
        kl = {text: row.kl or 0.0 for text, row in by_text.items()}
        ppl = [(row.ppl or 0.0) / (row.ppl_reference or 1.0) for row in by_text.values()]
        figures = [*(round(each, 4) for each in kl.values()), *(round(each, 3) for each in ppl)]
        rows.append([bench.model.name, name, "own", round(bits, 3), *figures])
        for text, lost in kl.items():
            ratio = result.kl[text] / lost  # of the last: ours with feedback, at BiLLM's bits
            report.criterion(f"{bench.model.name}_over_{name}_on_{text}", round(ratio, 4), "< 1", ratio < 1)
    return rows


def _beside(report: BenchmarkReport, bench: Bench, peers: Sequence[str]) -> list[list[Any]]:
    """Peers, and ours at the bytes of each."""
    rows = []
    for name in peers:
        theirs = _compared(bench, name)
        problem = next((row.problem for row in theirs.values() if row.problem), None)
        if problem is not None:
            report.note(f"{name}: {problem}")
            continue
        bits = next(row.bits or 0.0 for row in theirs.values())
        result = bench.measure(bits, "self", ())
        lost = {text: row.kl or 0.0 for text, row in theirs.items()}
        kl = [*lost.values(), result.plan.predicted.kl, *result.kl.values()]
        rows.append([bench.model.name, name, round(bits, 3), *(round(each, 5) for each in kl)])
        for text, other in lost.items():
            ratio = result.kl[text] / other
            report.criterion(
                f"{bench.model.name}_over_{name}_on_{text}", round(ratio, 4), f"<= {PEER_GOAL}", ratio <= PEER_GOAL
            )
    return rows


def _billm(bench: Bench, name: str) -> dict[str, Row]:
    """By text."""
    found = _compared(bench, name)
    for row in found.values():
        assert row.problem is None, row.problem
    return found


def _compared(bench: Bench, name: str) -> dict[str, Row]:
    """A method, by text. As many tokens calibrate it as calibrate ours."""
    found = {}
    for text, file in bench.measuring.items():
        compared = waterfill.compare(
            bench.model,
            file,
            methods=[name],
            match=False,
            context=CONTEXT,
            max_windows=bench.windows,
            sequences=-(-TOKENS // LENGTH),
        )
        (found[text],) = compared.rows
    return found


if __name__ == "__main__":
    main()
