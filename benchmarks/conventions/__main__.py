"""Are waterfill's figures those that people know, llama-perplexity's and lm-evaluation-harness's, on equal weights?

The example model is written as GGUF (F32, Q8_0, Q4_0). llama.cpp's figures are those of the program llama-perplexity
where there is one (`--llama-perplexity PATH`), else of a replica of its algorithm on llama-cpp-python's logits; the
report says which. Needs `waterfill[eval,gguf]`.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.tasks import TaskManager

import waterfill
from benchmarks.conventions.llama_perplexity import Program, Replica, as_printed, find_program
from benchmarks.shared.gguf_file import quantise, write_gguf
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.api import load_tokenizer
from waterfill.base.machine import package_version
from waterfill.evaluation import EvaluationCache, KldFile, convention, divergence, perplexity, token_ids
from waterfill.evaluation.llamacpp import load_gguf
from waterfill.evaluation.local_tasks import read_task
from waterfill.files.checkpoint import open_checkpoint
from waterfill.files.original import load_checkpoint

CONTEXT = 512
LAST_DIGIT = 1.0  # units: rounding alone is half of one


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    program_option = {"type": Path, "metavar": "PATH", "help": "the program; on the PATH when not given"}
    arguments = parse_arguments(__doc__, llama_perplexity=program_option)
    chunks = 8 if arguments.quick else 40
    report = BenchmarkReport("waterfill's figures against llama.cpp's and lm-evaluation-harness's")
    peers = ("llama_cpp_python", "lm_eval")
    report.note(", ".join(f"{name} {package_version(name) or 'not installed'}" for name in peers))
    text = held_out_text(report)
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / "text.txt"
        some.write_text(text.read_text("utf-8")[: 4000 * chunks], "utf-8")
        models = {"F32": write_gguf(EXAMPLE_MODEL, Path(folder) / "F32.gguf")}
        for kind in ("Q8_0", "Q4_0"):
            models[kind] = quantise(models["F32"], Path(folder) / f"{kind}.gguf", kind)
        program = find_program(arguments.llama_perplexity)
        llama_cpp: Program | Replica
        if program is None:
            llama_cpp = Replica(Path(folder), some, chunks)
            report.note("llama-perplexity: not found; a replica of its algorithm on llama-cpp-python's logits instead")
        else:
            llama_cpp = Program(program, Path(folder), some, chunks)
            report.note("llama-perplexity: the program itself")
        same_engine(report, llama_cpp, models, some, chunks)
        if isinstance(llama_cpp, Program):
            other_engine(report, llama_cpp, models["F32"], some, chunks)
        references(report, models, some, chunks, Path(folder))
        word_perplexity(report, models["F32"], some, Path(folder))
    report.save(arguments.json)


def same_engine(
    report: BenchmarkReport, llama_cpp: Program | Replica, models: dict[str, Path], text: Path, chunks: int
) -> None:
    """Every figure of llama-perplexity beside ours, llama.cpp computing the logits of both."""
    rows: list[list[Any]] = []
    for kind, path in models.items():
        model, tokenizer = load_gguf(path)
        ids = token_ids(tokenizer, text)[: chunks * CONTEXT]
        ours = perplexity(model, ids, convention="llama.cpp")
        printed = llama_cpp.perplexity(path)
        figures = {"ppl": ours.ppl, "ppl ±": ours.ppl * ours.nll_token_stderr}
        rows += [row(kind, name, printed[name], value) for name, value in figures.items()]
    for kind in ("Q8_0", "Q4_0"):
        printed, file = llama_cpp.divergence(models["F32"], models[kind])
        model, _ = load_gguf(models[kind])
        base = KldFile(file)
        measured = divergence(base, model, base.ids, context=base.context, convention="llama.cpp")
        figures = as_printed(measured)
        assert figures.keys() == printed.keys(), figures.keys() ^ printed.keys()
        rows += [row(kind, name, printed[name], value) for name, value in figures.items()]
    columns = ["model", "figure", "llama.cpp", "waterfill", "last digits apart"]
    report.table("llama-perplexity and waterfill on the same logits", columns, rows, key="same_logits")
    worst = max(row[-1] for row in rows)
    report.criterion("figures_compared", len(rows), ">= 80", len(rows) >= 80)
    report.criterion("largest_difference_in_last_digits", worst, f"<= {LAST_DIGIT}", worst <= LAST_DIGIT)


def other_engine(report: BenchmarkReport, llama_cpp: Program, path: Path, text: Path, chunks: int) -> None:
    """transformers computes ours, from the safetensors file. llama.cpp's cache of keys and values is 16-bit unless it
    is told otherwise."""
    model = load_checkpoint(open_checkpoint(EXAMPLE_MODEL))
    ids = token_ids(load_tokenizer(EXAMPLE_MODEL), text)[: chunks * CONTEXT]
    ours = perplexity(model, ids, convention="llama.cpp")
    wide = llama_cpp.perplexity(path, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    usual = llama_cpp.perplexity(path)
    rows = [row(name, "ppl", printed["ppl"], ours.ppl) for name, printed in (("32-bit", wide), ("16-bit", usual))]
    columns = ["llama.cpp's cache", "figure", "llama.cpp", "transformers", "last digits apart"]
    report.table("F32, llama.cpp and transformers", columns, rows, key="engines")
    apart = _units(ours.ppl, wide["ppl"])
    report.criterion("transformers_against_llama_cpp_in_last_digits", apart, f"<= {LAST_DIGIT}", apart <= LAST_DIGIT)


def references(report: BenchmarkReport, models: dict[str, Path], text: Path, chunks: int, folder: Path) -> None:
    """The model against itself, and what storing a reference does to the KL."""
    base = load_checkpoint(open_checkpoint(EXAMPLE_MODEL))
    ids = token_ids(load_tokenizer(EXAMPLE_MODEL), text)[: min(chunks, 16) * CONTEXT]
    packed, _ = load_gguf(models["Q4_0"])
    how = convention("llama.cpp", context=CONTEXT)
    cut = how.cut(ids)
    itself = divergence(base, base, ids, convention="llama.cpp")
    report.criterion("kl_of_the_model_against_itself", itself.kl_max, "== 0", itself.kl_max == 0)
    report.criterion("agreement_with_itself", itself.top1_agreement, "== 1", itself.top1_agreement == 1)
    live = divergence(base, packed, ids, convention="llama.cpp")
    rows = [["live", None, live.kl, live.kl, live.kl, 0.0]]
    all_bytes = sum(len(window.targets) for window in cut) * 8192 * 4
    for share in (1.01, 0.25, 0.0625):
        store = EvaluationCache(folder / str(share), int(share * all_bytes)).reference("key")
        store.fill(base, cut, how)
        known = divergence(store, packed, ids, convention="llama.cpp")
        form = known.reference
        rows.append([form.form, form.kept, known.kl, form.kl_low, form.kl_high, form.kl_sampling_stderr])
        if form.form == "exact":
            report.criterion("stored_reference_changes_nothing", known.kl - live.kl, "== 0", known.kl == live.kl)
        else:
            errors = abs(known.kl - live.kl) / form.kl_sampling_stderr
            report.criterion(f"top_{form.kept}_within_standard_errors", errors, "<= 4", errors <= 4)
            inside = form.kl_low <= live.kl <= form.kl_high
            report.criterion(f"top_{form.kept}_within_bounds", inside, "== True", inside)
    columns = ["reference", "kept", "KL", "at least", "at most", "sampling error"]
    report.table("a stored reference, Q4_0 against F32", columns, rows, key="references")
    whole = perplexity(base, ids[:2048], context=CONTEXT)
    decoded = perplexity(base, ids[:2048], context=CONTEXT, convention="decode")
    apart = abs(decoded.nll - whole.nll)
    report.criterion("decode_mode_against_one_pass_nats", apart, "<= 1e-6", apart <= 1e-6)


def word_perplexity(report: BenchmarkReport, gguf: Path, text: Path, folder: Path) -> None:
    """The figures of lm-eval's `wikitext` on local documents: its own `hf` model against `waterfill eval --tasks`."""
    import lm_eval

    documents = folder / "documents.jsonl"
    whole = text.read_text("utf-8")
    pieces = [whole[start : start + 6000] for start in range(0, min(len(whole), 48_000), 6000)]
    documents.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), "utf-8")
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(EXAMPLE_MODEL), "dtype": "float32", "device": "cpu"},
        tasks=[read_task(documents)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    expected = {key.partition(",")[0]: value for key, value in own["results"]["documents"].items()}
    rows = []
    for name, model in (("transformers", EXAMPLE_MODEL), ("llama.cpp, F32", gguf)):
        found = waterfill.evaluate(model, tasks=[str(documents)], cache=False)
        assert found.tasks is not None
        for score in found.tasks.scores:
            apart = abs(score.value / expected[score.metric] - 1)
            rows.append([name, score.metric, expected[score.metric], score.value, apart])
    columns = ["model", "figure", "lm-eval's hf model", "waterfill", "relative difference"]
    report.table("lm-eval's figures for documents", columns, rows, key="documents")
    same = max(row[-1] for row in rows if row[0] == "transformers")
    other = max(row[-1] for row in rows if row[0] != "transformers")
    report.criterion("word_perplexity_against_lm_eval_relative", same, "<= 1e-9", same <= 1e-9)
    report.criterion("word_perplexity_through_llama_cpp_relative", other, "<= 1e-3", other <= 1e-3)


def row(kind: str, name: str, printed: tuple[float, float], value: float) -> list[Any]:
    """A figure with the digits that llama.cpp prints, ours with one more."""
    digits = round(-math.log10(printed[1]))
    return [kind, name, f"{printed[0]:.{digits}f}", f"{value:.{digits + 1}f}", _units(value, printed)]


def _units(value: float, printed: tuple[float, float]) -> float:
    return abs(value - printed[0]) / printed[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
