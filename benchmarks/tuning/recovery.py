"""What comes back of a packed model's loss by training scales, and by adapters from several starts.

    recovery   --models packed at 2, 2.5 and 3 bits (the bitshift trellis, with error feedback): KL to the original
               on text that was neither trained nor looked at; as packed, with trained scales, with LoftQ's and ApiQ's
               starts of an adapter, and trained from each start. Bytes are of all weight files, adapters included
    memory     peak of a step of an adapter beside packed weights and beside the original ones in float32, activations
               checkpointed, in processes of their own, beyond what they take once everything is imported

Everything is trained on the first part of the held-out text, and measured on its last part. With --quick, few steps at
2 bits.
"""

from __future__ import annotations

import gc
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import waterfill
from benchmarks.shared.report import BenchmarkReport
from benchmarks.tuning.step import peak_of_step
from waterfill.evaluation.conventions import Convention, Window
from waterfill.evaluation.expected import score
from waterfill.evaluation.scoring import window_logits
from waterfill.evaluation.store import ReferenceStore
from waterfill.evaluation.text import token_ids
from waterfill.files.original import load_tokenizer, model_of

PARTS = ("recovery", "memory")
RATES = (2.0, 2.5, 3.0)
STEPS, QUICK_STEPS = 200, 8
BATCH, CONTEXT = 4, 128
RANK = 16
TRAINED_SHARE = 0.7  # of the text
WINDOWS, QUICK_WINDOWS = 24, 4  # that are measured
SCALES_GOAL, APIQ_GOAL = 0.30, 0.25  # of KL at the lowest rate, taken away
MEMORY_GOAL = 0.4
REFERENCE_BYTES = 4_000_000_000


def recover(report: BenchmarkReport, text: Path, arguments: Namespace) -> None:
    """Tables `recovery_MODEL` and `memory`, and their criteria."""
    with tempfile.TemporaryDirectory() as name:
        scratch, rows = Path(name), []
        for checkpoint in arguments.models:
            kept = (arguments.folder or scratch) / checkpoint.name
            if "recovery" in arguments.part:
                measure_recovery(report, checkpoint, text, kept, scratch, arguments)
            if "memory" in arguments.part:
                rows.append(measure_memory(report, checkpoint, kept, min(arguments.rates)))
        if rows:
            columns = ["model", "MB packed", "MB float32", "times"]
            report.table(f"memory of a step, {CONTEXT} tokens", columns, rows, key="memory")


def packed(checkpoint: Path, kept: Path, rate: float) -> Path:
    out = kept / f"{rate:g}"
    if not out.exists():
        waterfill.pack(checkpoint, out, bits=rate + 0.05, codecs=["bitshift"])  # scales take some hundredths
    return out


def measure_recovery(
    report: BenchmarkReport, checkpoint: Path, text: Path, kept: Path, scratch: Path, arguments: Namespace
) -> None:
    ids = token_ids(load_tokenizer(checkpoint), text)
    content = text.read_text("utf-8")
    training = scratch / f"{checkpoint.name}.txt"
    training.write_text(content[: int(TRAINED_SHARE * len(content))], "utf-8")
    how = Convention("gptq", CONTEXT)
    last = ids[-CONTEXT * (QUICK_WINDOWS if arguments.quick else WINDOWS) :]
    cut = how.cut(last)
    store = ReferenceStore(scratch / "references" / checkpoint.name, REFERENCE_BYTES)
    store.fill(model_of(checkpoint, dtype=torch.float32), cut, how)
    gc.collect()
    steps = QUICK_STEPS if arguments.quick else arguments.steps
    rows: list[list[Any]] = []
    for rate in arguments.rates[:1] if arguments.quick else arguments.rates:
        artifact = packed(checkpoint, kept, rate)
        own = waterfill.inspect(artifact, verify=False).size_bytes
        weights = sum(tensor.weights for tensor in waterfill.inspect(artifact, verify=False).plan.tensors)
        first = loss_of(waterfill.load(artifact, dtype=torch.float32), store, cut, how)
        losses = {"packed": first}

        def add(name: str, kl: float, size_bytes: int, losses: dict[str, float] = losses, rate: float = rate) -> None:
            losses[name] = kl
            less = 1 - kl / losses["packed"]
            rows.append([rate, name, size_bytes, 8 * size_bytes / weights, kl, less])  # noqa: B023
            report.note(f"{checkpoint.name}, {rate:g} bits, {name}: KL {kl:.4f}, {100 * less:.1f} % less")

        add("packed", first, own)
        options: dict[str, Any] = {"text": training, "teacher": checkpoint, "batch": BATCH, "context": CONTEXT}
        out = scratch / f"{checkpoint.name}-{rate:g}"
        tuned = waterfill.tune(artifact, out / "scales", steps=steps, **options)
        add(
            f"scales, {steps} steps",
            loss_of(waterfill.load(out / "scales", dtype=torch.float32), store, cut, how),
            tuned.size_bytes,
        )
        for init, count in (("loftq", 0), ("apiq", 0), ("default", steps), ("loftq", steps), ("apiq", steps)):
            folder = out / f"{init}-{count}"
            made = waterfill.tune(artifact, folder, what="lora", init=init, rank=RANK, steps=count, **options)
            title = f"adapter, {init}" + (f", {count} steps" if count else "")
            add(title, loss_of(with_adapter(artifact, folder), store, cut, how), own + made.size_bytes)
        if rate == min(arguments.rates):
            judge(report, checkpoint.name, losses, steps)
    columns = ["bits", "what", "bytes", "bits of all bytes", "KL, nats", "less"]
    report.table(
        f"{checkpoint.name}, {len(cut)} windows of {CONTEXT}", columns, rows, key=f"recovery_{checkpoint.name}"
    )


def judge(report: BenchmarkReport, name: str, losses: dict[str, float], steps: int) -> None:
    scales, apiq, loftq = (
        1 - losses[key] / losses["packed"] for key in (f"scales, {steps} steps", "adapter, apiq", "adapter, loftq")
    )
    report.criterion(f"scales_take_away_{name}", round(scales, 3), f">= {SCALES_GOAL}", scales >= SCALES_GOAL)
    report.criterion(f"apiq_takes_away_{name}", round(apiq, 3), f">= {APIQ_GOAL}", apiq >= APIQ_GOAL)
    report.criterion(f"apiq_over_loftq_{name}", round(apiq - loftq, 3), "> 0", apiq > loftq)


def with_adapter(artifact: Path, folder: Path) -> Any:
    from peft import PeftModel

    model = waterfill.load(artifact, dtype=torch.float32)
    PeftModel.from_pretrained(model, folder)  # puts its layers into the model
    return model


def loss_of(model: Any, store: ReferenceStore, cut: Sequence[Window], how: Convention) -> float:
    """Mean KL to what the store has, nats per token."""
    scores: list[Tensor] = []
    for window in cut:
        (logits,) = window_logits(model.eval(), [window], how)
        scores.append(score(store.expected(window), logits, window.targets)[0])
    return float(torch.cat(scores).mean())


def measure_memory(report: BenchmarkReport, checkpoint: Path, kept: Path, rate: float) -> list[Any]:
    peaks = [peak_of_step(path, CONTEXT, RANK) for path in (packed(checkpoint, kept, rate), checkpoint)]
    times = peaks[0] / peaks[1]
    report.criterion(f"memory_of_a_step_{checkpoint.name}", round(times, 3), f"<= {MEMORY_GOAL}", times <= MEMORY_GOAL)
    return [checkpoint.name, peaks[0] / 1e6, peaks[1] / 1e6, times]
