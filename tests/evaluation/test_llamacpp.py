"""GGUF files: llama.cpp's logits through our interface, and its own figures from our formulas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import waterfill
from tests.support import task_samples
from tests.support.commands import Command
from tests.support.models import tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.evaluation import KldFile, begin_token, divergence, perplexity, token_ids
from waterfill.evaluation.llamacpp import load_gguf
from waterfill.evaluation.local_tasks import read_task
from waterfill.evaluation.subjects import open_subject
from waterfill.evaluation.tasks import run_tasks

conversion: Any = pytest.importorskip("benchmarks.shared.gguf_file", reason="benchmarks/ is not here")
replica: Any = pytest.importorskip("benchmarks.conventions.llama_perplexity", reason="benchmarks/ is not here")

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError):
    llama_cpp = None
needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed: waterfill[gguf]")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, ref_llama: Path) -> dict[str, Path]:
    """The example model as it is, quantised, and with a BOS before every text; and some text."""
    folder = tmp_path_factory.mktemp("gguf")
    files = {"F32": conversion.write_gguf(ref_llama, folder / "F32.gguf")}
    files["Q4_0"] = conversion.quantise(files["F32"], folder / "Q4_0.gguf", "Q4_0")
    files["BOS"] = conversion.write_gguf(ref_llama, folder / "BOS.gguf", add_bos=True)
    files["text"] = folder / "text.txt"
    files["text"].write_text(task_samples.source_text()[:7000])
    return files


@pytest.fixture(scope="module")
def original(ref_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32).eval()


@needs_llama_cpp
def test_tokens_are_those_of_the_original(gguf: dict[str, Path], ref_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ref_llama)
    _, own = load_gguf(gguf["F32"])
    for text in (task_samples.source_text()[:5000], "größer, 漢字\n\n  x", "", "<|endoftext|> is text here"):
        ids = own(text)["input_ids"]
        if "<|" not in text:
            assert ids == tokenizer(text)["input_ids"]
        assert own.decode(ids) == text
    assert (own.bos_token_id, own.eos_token_id) == (0, 0)
    assert begin_token(own) is None
    assert begin_token(load_gguf(gguf["BOS"])[1]) == 0


@needs_llama_cpp
def test_logits_are_those_of_the_original(gguf: dict[str, Path], original: Any) -> None:
    """llama.cpp keeps keys and values in 16 bits."""
    model, _ = load_gguf(gguf["F32"])
    ids = torch.randint(8192, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=0.02)
    assert model(ids, last=True).logits.shape == (3, 1, 8192)
    assert torch.allclose(model(ids, last=True).logits[:, 0], expected[:, -1], atol=0.02)
    past, steps = None, []
    for step in range(12):
        output = model(ids[:, step : step + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits[:, 0])
    assert past is not None
    assert past.get_seq_length() == 12
    assert torch.allclose(torch.stack(steps, 1), expected[:, :12], atol=0.02)
    with pytest.raises(WaterfillError, match="1 tokens of 2 sequences do not fit after 12 of 3"):
        model(ids[:2, :1], past_key_values=past, use_cache=True)


@needs_llama_cpp
def test_generation_is_greedy(gguf: dict[str, Path], original: Any) -> None:
    model, tokenizer = load_gguf(gguf["F32"])
    ids = tokenizer("from __future__ import")["input_ids"]
    with torch.no_grad():
        expected = original.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert model.generate(ids, 8) == expected
    assert model.generate(ids, 8, ends=[expected[3]]) == expected[: expected.index(expected[3])]
    assert model.generate(ids, 8, ended=lambda said: len(said) == 2) == expected[:2]


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["F32", "BOS"])
def test_perplexity_is_llama_cpps(kind: str, gguf: dict[str, Path], tmp_path: Path) -> None:
    """As llama-perplexity prints it, by a replica of its algorithm that shares no code with ours."""
    model, tokenizer = load_gguf(gguf[kind])
    ids = token_ids(tokenizer, gguf["text"])
    ours = perplexity(model, ids, convention="llama.cpp", bos=begin_token(tokenizer))
    assert ours.windows >= 3
    printed = replica.Replica(tmp_path, gguf["text"], 99).perplexity(gguf[kind])
    assert ours.ppl == pytest.approx(printed["ppl"][0], abs=1e-4)
    assert ours.ppl * ours.nll_token_stderr == pytest.approx(printed["ppl ±"][0], abs=1e-5)


@needs_llama_cpp
def test_divergence_is_llama_cpps(gguf: dict[str, Path], tmp_path: Path) -> None:
    """Every figure of the report, to two units of the last of up to eight printed digits: it adds up 32-bit floats."""
    printed, file = replica.Replica(tmp_path, gguf["text"], 99).divergence(gguf["F32"], gguf["Q4_0"])
    base, (model, _) = KldFile(file), load_gguf(gguf["Q4_0"])
    measured = divergence(base, model, base.ids, context=base.context, convention="llama.cpp")
    figures = replica.as_printed(measured)
    assert figures.keys() == printed.keys()
    assert len(figures) > 40
    for name, value in figures.items():
        assert value == pytest.approx(printed[name][0], abs=2 * printed[name][1]), name


@needs_llama_cpp
def test_the_same_command_for_all_kinds(gguf: dict[str, Path], command: Command, work: Path, ref_llama: Path) -> None:
    options = ["--text", gguf["text"], "--convention", "llama.cpp", "--windows", "2", "--json"]
    alone = command("eval", gguf["F32"], *options).record
    plain = command("eval", ref_llama, *options).record
    assert alone["ppl"] == pytest.approx(plain["ppl"], rel=1e-3)
    assert (alone["convention"], alone["tokens"], alone["context"]) == ("llama.cpp", 2 * 255, 512)
    against = command("eval", gguf["Q4_0"], "--against", gguf["F32"], *options).record
    assert against["ppl_reference"] == pytest.approx(alone["ppl"], rel=1e-6)
    crossed = command("eval", gguf["Q4_0"], "--against", ref_llama, *options).record
    assert crossed["kl"] == pytest.approx(against["kl"], rel=0.05)
    assert crossed["size_bytes"] == gguf["Q4_0"].stat().st_size
    packed = command("eval", work / "packed", "--against", gguf["F32"], *options).record
    assert packed["predicted_kl"] is not None
    assert packed["ppl_reference"] == pytest.approx(alone["ppl"], rel=1e-6)


@needs_llama_cpp
def test_tasks_score_as_transformers_does(
    gguf: dict[str, Path], original: Any, ref_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: waterfill[eval]")
    makers = (task_samples.multiple_choice, task_samples.generation, task_samples.documents)
    specs = [read_task(maker(tmp_path)) for maker in makers]
    expected = run_tasks(original, AutoTokenizer.from_pretrained(ref_llama), specs, batch=4, limit=3)
    found = run_tasks(*load_gguf(gguf["F32"]), specs, limit=3)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert (one.task, one.metric, one.samples) == (other.task, other.metric, other.samples)
        assert one.value == pytest.approx(other.value, rel=1e-3), one.metric


@needs_llama_cpp
def test_files_that_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match=r"absent\.gguf is no file"):
        open_subject(tmp_path / "absent.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(WaterfillError, match=r"llama\.cpp cannot load .*torn\.gguf"):
        open_subject(tmp_path / "torn.gguf")


@needs_llama_cpp
def test_widths_and_heads_of_other_models(tmp_path: Path) -> None:
    """Untied, with other numbers of heads: the conversion has to reorder q and k."""
    path = tiny_llama(tmp_path / "model")
    model, _ = load_gguf(conversion.write_gguf(path, tmp_path / "model.gguf"))
    ids = torch.randint(100, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=0.02 * float(expected.abs().max()))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(WaterfillError, match=r"install the extra with pip install 'waterfill\[gguf\]'"):
        waterfill.evaluate(tmp_path / "model.gguf", text=tmp_path / "text.txt")
