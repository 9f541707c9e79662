"""The verb `evaluate` and its command: what is kept between runs, what is refused, and results as plain data."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support.commands import Command
from waterfill.base.errors import WaterfillError
from waterfill.base.records import Estimate, finite, flattened
from waterfill.evaluation import EvaluationCache, plots, subjects
from waterfill.evaluation import evaluate as evaluation
from waterfill.running import loading

TEXT_OPTIONS = {"context": 64, "max_windows": 9}


def measured(work: Path, reference: Path, **options: Any) -> waterfill.Evaluation:
    return waterfill.evaluate(work / "packed", reference, work / "text.py", **{**TEXT_OPTIONS, **options})


def without_form(result: waterfill.Evaluation) -> dict[str, Any]:
    return {key: value for key, value in flattened(result.to_dict()).items() if "divergence.reference" not in key}


def test_the_reference_is_read_once(work: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[str] = []
    first = measured(work, ref_llama, progress=lambda what, *_: stages.append(what))
    opened = ["opening the model"] * 4 + ["reading the text"] * 2
    loaded = ["loading the model"] * 2
    assert stages == [*opened, *loaded, *["reading the original"] * 9, *loaded, *["measuring"] * 10]
    assert first.divergence is not None
    assert first.divergence.reference.form == "exact"
    live = measured(work, ref_llama, cache=False)
    assert without_form(live) == without_form(first)
    monkeypatch.delattr(subjects, "load_checkpoint_in")
    stages.clear()
    again = measured(work, ref_llama, progress=lambda what, *_: stages.append(what))
    assert again == first
    assert stages == [*opened, *loaded, *["measuring"] * 10]
    assert not list((EvaluationCache.default().folder / "scores").iterdir())


def test_a_reference_larger_than_memory_is_read_block_by_block(
    work: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = measured(work, ref_llama, cache=False)
    monkeypatch.setattr(loading, "fits", lambda _: False)
    with caplog.at_level(logging.INFO, "waterfill"):
        found = measured(work, ref_llama, cache=False)
    assert "larger than the memory that is free: its weights are read block by block" in caplog.text
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.ppl_reference == pytest.approx(expected.ppl_reference, rel=1e-5)


@pytest.mark.parametrize("size", ["4GB", "10kB"])  # the original's predictions are on disk, and they are not
def test_an_interrupted_evaluation_continues(
    size: str, work: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATERFILL_CACHE_SIZE", size)
    whole = measured(work, ref_llama)
    seen: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "measuring":
            seen.append(done)
            if done == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(work, ref_llama, progress=interrupt)
    assert seen == [0, 1, 2, 3, 4, 5]
    steps: list[tuple[str, int, int]] = []
    assert measured(work, ref_llama, progress=lambda *step: steps.append(step)) == whole
    assert [step for step in steps if step[0] == "measuring"] == [("measuring", done, 9) for done in (5, 6, 7, 8, 9)]


def test_a_cache_that_is_too_small_is_done_without(
    work: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATERFILL_CACHE_SIZE", "10kB")
    result = measured(work, ref_llama)
    assert result.divergence is not None
    assert result.divergence.reference.form == "live"
    monkeypatch.setenv("WATERFILL_CACHE_SIZE", "3MB")
    partial = measured(work, ref_llama)
    assert partial.divergence is not None
    assert partial.divergence.reference.form == "top-k"
    error = partial.divergence.reference.kl_sampling_stderr
    assert partial.divergence.kl == pytest.approx(result.divergence.kl, abs=4 * error)
    assert error < 0.1 * result.divergence.kl


def test_a_model_against_itself(command: Command, work: Path, ref_llama: Path) -> None:
    options = ["--text", work / "text.py", "--context", "64", "--windows", "4", "--json"]
    for extra in ([], ["--no-cache"], ["--convention", "llama.cpp"], ["--convention", "strided", "--stride", "16"]):
        record = command("eval", ref_llama, "--against", ref_llama, *options, *extra).record
        assert (record["kl"], record["kl_max"], record["top1_agreement"]) == (0, 0, 1)
        assert (record["token_statistics"]["rms"]["value"], record["log_ppl_ratio"]) == (0, 0)
        assert record["predicted_kl"] is None


@pytest.mark.parametrize("convention", ["gptq", "strided", "llama.cpp", "decode"])
def test_perplexity_alone_is_that_of_a_comparison(
    convention: str, command: Command, work: Path, ref_llama: Path
) -> None:
    options = ["--text", work / "text.py", "--context", "16", "--windows", "2", "--convention", convention, "--json"]
    alone = command("eval", ref_llama, *options).record
    both = command("eval", work / "packed", "--against", ref_llama, *options).record
    assert alone["ppl"] == pytest.approx(both["ppl_reference"], rel=1e-6)
    for name in ("convention", "context", "stride", "tokens", "windows", "bos"):
        assert alone[name] == both[name], name
    assert alone["convention"] == convention
    packed = command("eval", work / "packed", *options).record
    assert packed["ppl"] == pytest.approx(both["ppl"], rel=1e-6)


@pytest.mark.parametrize(("share", "dtype"), [(0.0, torch.bfloat16), (1.0, torch.float32)])
def test_one_dtype_alone_and_beside_whatever_memory_allows(
    share: float, dtype: torch.dtype, work: Path, ref_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model and its reference do not choose each for itself."""
    loaded: list[str] = []

    def told(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            loaded.append(f"{name} {model.dtype}")
            return model

        return call

    for name in ("load", "load_checkpoint_in"):
        monkeypatch.setattr(subjects, name, told(name, getattr(subjects, name)))
    monkeypatch.setattr("waterfill.files.original.FLOAT32_SHARE", share)
    options: dict[str, Any] = {"text": work / "text.py", "context": 16, "max_windows": 2, "cache": False}
    beside = waterfill.evaluate(work / "packed", ref_llama, **options)
    alone = waterfill.evaluate(work / "packed", **options)
    assert alone.ppl == pytest.approx(beside.ppl, rel=1e-6)
    assert loaded == [f"load_checkpoint_in {dtype}", f"load {dtype}", f"load {dtype}"]


def test_tables(command: Command, work: Path, ref_llama: Path) -> None:
    options = ["--text", work / "text.py", "--context", "64", "--windows", "2"]
    said = command("eval", work / "packed", "--against", ref_llama, *options, "--statistics").out
    lines = {line.strip() for line in said.splitlines()}
    assert "126 tokens in windows of 64 (GPTQ convention)" in lines
    for start in ("Mean PPL(Q)-PPL(base)", "99.9%   KLD", "RMS Δp", "Same top p"):
        assert any(line.startswith(start) for line in lines), start
    assert "RMS Δp" not in command("eval", work / "packed", "--against", ref_llama, *options).out
    strided = command("eval", ref_llama, *options, "--convention", "strided", "--stride", "8").out
    assert "(strided by 8)" in strided
    assert "perplexity" in strided


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], r"nothing to measure; give a text, tasks or efficiency \(--text, --tasks, --efficiency\)"),
        (["--text", "TEXT", "--stride", "4"], "only the conventions strided and exl3 have one"),
        (["--text", "TEXT", "--against", "base.kld"], "base.kld has its text in it; leave out the other one"),
        (["--against", "absent.kld"], "absent.kld is no file"),
        (["--text", "TEXT", "--convention", "mine"], "'mine' is not one of"),
        (["--tasks", "absent.jsonl"], "absent.jsonl cannot be read"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], sentence: str, command: Command, work: Path, ref_llama: Path
) -> None:
    result = command("eval", ref_llama, *[part.replace("TEXT", f"{work}/text.py") for part in arguments])
    assert (result.code, result.out) == (2, "")
    assert re.search(sentence, result.err), result.err


def test_results_are_plain_data(work: Path, ref_llama: Path) -> None:
    result = measured(work, ref_llama, max_windows=2)
    record = json.loads(result.to_json())
    assert record == json.loads(json.dumps(finite(result.to_dict())))
    assert record["divergence"]["kl_statistics"]["mean"]["value"] == result.kl
    with pytest.raises(AttributeError):
        result.kl = 0.0  # type: ignore[misc]
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: waterfill[eval]")
    series = result.to_pandas()
    assert series["divergence.token_statistics.same_top.value"] == result.top1_agreement
    frame = pandas.DataFrame([result.to_pandas(), result.to_pandas()])
    assert list(frame["kl"]) == [result.kl, result.kl]


def test_json_has_no_numbers_that_are_not() -> None:
    assert Estimate(math.nan, math.inf).to_json() == '{"value": null, "error": null}'


def test_without_pandas_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(WaterfillError, match="pandas is not installed; install it, or use"):
        Estimate(1.0, 2.0).to_pandas()


def test_plots_return_their_figure(work: Path, ref_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: waterfill[plot]")
    result = measured(work, ref_llama, max_windows=2)
    figure = plots.plot_kl_against_size({"packed": result})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in points] == [
        [[result.size_bytes / 1e6, result.kl]],
        [[result.size_bytes / 1e6, result.predicted_kl]],
    ]
    figure.savefig(tmp_path / "figure.png")
    (axes,) = plots.plot_kl_percentiles({"packed": result, "again": result}).axes
    assert [line.get_label() for line in axes.get_lines()] == ["packed", "again"]
    assert result.divergence is not None
    assert axes.get_lines()[0].get_ydata()[-1] == result.divergence.kl_max
    alone = evaluation.Evaluation(size_bytes=1)
    for plot in (plots.plot_kl_against_size, plots.plot_kl_percentiles):
        with pytest.raises(WaterfillError, match="none of the evaluations has a KL"):
            plot({"alone": alone})
