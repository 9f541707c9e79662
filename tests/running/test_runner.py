"""Who runs a model: the engine where it can, transformers elsewhere; from the command line and from Python."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import waterfill
from tests.support import models
from tests.support.commands import Command
from tests.support.plans import plan_for
from waterfill.base import native
from waterfill.base.errors import UnsupportedError, WaterfillError
from waterfill.planning.budget import Budget
from waterfill.running.engine.families.llama import LlamaModel
from waterfill.running.hf import fused
from waterfill.running.runner import open_runner
from waterfill.running.text.sampling import Sampling

pytestmark = pytest.mark.skipif(native.isa() is None, reason="the native library was not built, or is switched off")

GREEDY = ("--temperature", "0", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes transformers."""
    root = tmp_path_factory.mktemp("gpt2")
    checkpoint = models.tiny_gpt2(root / "model", tokenizer=True)
    waterfill.pack(
        checkpoint,
        root / "packed",
        plan=plan_for(checkpoint, codecs=["higgs-p1-n256"], budget=Budget(bits=16.0), uniform=True),
    )
    return root / "packed"


def test_both_engines_say_the_same(work: Path, command: Command) -> None:
    texts = {
        engine: command("generate", work / "packed", "-p", "def read(", *GREEDY, "--engine", engine)
        for engine in ("auto", "native", "transformers")
    }
    assert {result.code for result in texts.values()} == {0}
    assert len({result.out for result in texts.values()}) == 1
    assert texts["auto"].out.startswith("def read(")
    assert all("12 tokens, first after" in result.err for result in texts.values())
    assert not any("slow" in result.err for result in texts.values())


def test_layers_that_are_not_native_calls_are_one_line(
    work: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a transformers whose layers are called otherwise."""
    fused._say.cache_clear()
    monkeypatch.setattr(fused, "handed_cache", lambda given: (False, None))
    result = command("generate", work / "packed", "-p", "def read(", *GREEDY, "--engine", "transformers")
    assert result.code == 0
    assert result.err.count("decoder layers run one operator at a time, which is slower: transformers ") == 1


def test_a_model_of_another_kind_falls_back_and_says_why(gpt2: Path, command: Command) -> None:
    plain = command("generate", gpt2, "-p", "def", *GREEDY)
    assert plain.code == 0
    assert "is run by transformers, slower and in more memory: its kind is 'gpt2'" in plain.err
    refused = command("generate", gpt2, "-p", "def", "--engine", "native")
    assert refused.code == 2
    assert "the native engine does not run" in refused.err
    assert (
        "its kind is 'gpt2', not one of gemma3_text, llama, mistral, qwen2, qwen3; leave it to transformers"
        in refused.err
    )
    with pytest.raises(UnsupportedError, match="its kind is 'gpt2'"):
        waterfill.Engine(gpt2)


def test_coded_keys_and_values_take_the_native_engine(work: Path, gpt2: Path, command: Command, tmp_path: Path) -> None:
    refused = command("generate", gpt2, "-p", "def", "--kv", "4")
    assert refused.code == 2
    assert "kv is '4', which takes the native engine, and that does not run" in refused.err
    assert "so: its kind is 'gpt2'" in refused.err
    refused = command("chat", work / "packed", "--engine", "transformers", "--kv", "4")
    assert refused.code == 2
    assert "kv is '4' and engine is 'transformers', which keeps keys and values as they are" in refused.err
    path = models.tiny_llama(tmp_path / "model", layers=1, tokenizer=True, head_dim=40)
    plan = plan_for(path, codecs=["higgs-p1-n16"], budget=Budget(bits=16.0), uniform=True)
    waterfill.pack(path, tmp_path / "packed", plan=plan)
    with pytest.raises(WaterfillError, match="its heads have 40 dimensions, and coded keys and values need a multiple"):
        waterfill.open_runner(tmp_path / "packed", kv=(5, 4))


def test_drafts_and_look_ups_say_the_same(work: Path, command: Command) -> None:
    plain = command("generate", work / "packed", "-p", "x = 1\nx = 1\nx =", *GREEDY, "--json").record
    for way in ("--lookup", "4"), ("--draft", work / "packed"):
        found = command("generate", work / "packed", "-p", "x = 1\nx = 1\nx =", *GREEDY, *way, "--json").record
        assert found["text"] == plain["text"]


def test_a_conversation_reads_only_what_is_new(work: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = LlamaModel.forward
    monkeypatch.setattr(
        "waterfill.running.engine.families.llama.LlamaModel.forward",
        lambda model, sequences, tokens, logits=1: (
            read.extend(map(len, tokens)),
            forward(model, sequences, tokens, logits),
        )[1],
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add(a, b):\nand once more\n"))
    record = command("chat", work / "packed", *GREEDY, "--json").record
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * 2
    first, second = read[0], read[12]
    assert read.count(1) == 22
    whole = len(waterfill.Engine(work / "packed").tokenizer.prompt_ids(record["messages"][:3]))
    assert 1 < second < whole
    assert second <= whole - first


def test_a_runner_is_asked_in_one_way_whichever_engine_runs(work: Path) -> None:
    prompts, greedy = ["def read(", "x = 1\nx = 1\nx =", "import os"], {"temperature": 0, "max_new_tokens": 8}
    found = []
    for engine in ("native", "transformers"):
        runner = waterfill.open_runner(work / "packed", lookup=3, engine=engine)
        assert isinstance(runner, waterfill.Runner)
        assert runner.streaming is None
        single = ["".join(runner.generate(prompt, **greedy)) for prompt in prompts]
        many = runner.generate_many(prompts, **greedy)
        assert many.texts() == single
        assert many.stats.tokens == 8 * len(prompts)
        numbers = [number for number, _ in runner.generate_many(prompts, Sampling(**greedy), together=2)]
        assert set(numbers) == {0, 1, 2}
        found.append(single)
    assert found[0] == found[1]
    with pytest.raises(WaterfillError, match="engine is 'gpu'; choose one of auto, native, transformers"):
        waterfill.open_runner(work / "packed", engine="gpu")


def test_sampling_has_seeds_and_ranges(work: Path) -> None:
    runner = open_runner(work / "packed", engine="native")
    seeded = ["".join(runner.generate("def", Sampling(max_new_tokens=20, temperature=1.0, seed=s))) for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    with pytest.raises(WaterfillError, match="temperature is -1"):
        runner.generate("def", Sampling(temperature=-1))


def test_the_command_imports_neither_torch_nor_transformers(work: Path) -> None:
    script = (
        "import sys\n"
        "sys.argv = ['waterfill', 'generate', sys.argv[1], '-p', 'def', '--json', '--max-new-tokens', '3']\n"
        "from waterfill.cli.main import main; main()\n"
        "print(sorted({'torch', 'transformers', 'safetensors.torch', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(work / "packed")],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    record, imported = done.stdout.splitlines()
    assert json.loads(record)["tokens"] == 3
    assert imported == "[]"
