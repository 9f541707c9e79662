"""A limit on memory is a limit on the process, whoever runs the model; what cannot be held below it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import waterfill
from tests.support import models, streams
from tests.support.kernel_samples import needs_engine
from tests.support.plans import plan_for
from waterfill.base import process
from waterfill.base.errors import MemoryLimitError, WaterfillError
from waterfill.files.artifact import open_artifact
from waterfill.planning.budget import Budget
from waterfill.running.hf.trial import LENGTHS, try_passes
from waterfill.running.runner import open_runner
from waterfill.running.streaming.fit import fit, kept_size
from waterfill.running.streaming.limit import LEAST_PASS, Limit, Working
from waterfill.running.text.sampling import Sampling

pytestmark = pytest.mark.usefixtures("no_reader_left")


RUN = """
import json, sys
from pathlib import Path
asked = json.loads(sys.argv[1])
from waterfill.base import process
from waterfill.base.errors import MemoryLimitError
from waterfill.running.runner import open_runner
from waterfill.running.text.sampling import Sampling
if asked["engine"] == "native":
    import waterfill.running.engine.engine
    import waterfill.running.text.generation
else:
    import waterfill.running.loading
memory = asked["memory"] or process.resident_bytes() + asked["spare"]
said = {"memory": memory, "refused": None, "smallest": None}
try:
    draft = None if asked["draft"] is None else Path(asked["draft"])
    runner = open_runner(asked["artifact"], memory=memory, draft=draft, engine=asked["engine"])
    for prompt in asked["prompts"]:
        said["text"] = "".join(runner.generate(prompt, Sampling(max_new_tokens=8, temperature=0)))
    said["streamed"] = runner.streaming is not None
except MemoryLimitError as error:
    said |= {"refused": str(error), "smallest": error.smallest_bytes}
print(json.dumps(said | {"peak": process.peak_bytes()}))
"""
MB = 1_000_000
SLACK = 8 * MB  # by which one process and the next differ
LONG = 1500  # tokens, one for each word


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose keys and values are as large as its weights after a thousand tokens: 16 kB each."""
    root = tmp_path_factory.mktemp("wide")
    checkpoint = models.tiny_llama(
        root / "model", tokenizer=True, hidden=256, intermediate=512, heads=32, kv_heads=32, head_dim=32, layers=4
    )
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    plan = plan_for(checkpoint, codecs=["trellis-s8-r3.0000"], budget=Budget(bits=16.0), uniform=True)
    waterfill.pack(checkpoint, root / "packed", plan=plan)
    return root / "packed"


def run(
    artifact: Path, engine: str, *, prompts: list[int], draft: bool = False, spare: int = 0, memory: int = 0
) -> Any:
    """What a process of its own says of texts of so many tokens, within `memory` or so much more than imports take."""
    asked = {"artifact": str(artifact), "engine": engine, "draft": str(artifact) if draft else None}
    asked |= {"prompts": ["def" + " x" * tokens for tokens in prompts], "spare": spare, "memory": memory}
    return in_process(RUN, asked)


def in_process(script: str, asked: dict[str, Any], **environment: str) -> Any:
    """What a script in a process of its own says of what is asked."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("engine", "draft"),
    [
        pytest.param("native", False, marks=needs_engine),
        pytest.param("native", True, marks=needs_engine),
        ("transformers", False),
    ],
)
def test_a_process_stays_below_the_limit_or_says_what_would_do(wide: Path, engine: str, draft: bool) -> None:
    refused = run(wide, engine, prompts=[LONG], draft=draft, spare=MB)
    while refused["refused"] and "for reading" not in refused["refused"]:  # but for loading, which depends on torch
        memory = refused["smallest"] + SLACK
        assert memory > refused["memory"]
        refused = run(wide, engine, prompts=[LONG], draft=draft, memory=memory)
    assert refused["peak"] <= refused["memory"]
    needed = refused["memory"]
    if refused["refused"]:  # what loading is reckoned with need not leave enough
        assert f"are too little for reading {LONG + 1} tokens and writing 8 with" in refused["refused"]
        needed = refused["smallest"]
    enough = run(wide, engine, prompts=[10, LONG], draft=draft, memory=needed + SLACK)
    assert enough["refused"] is None
    assert enough["peak"] <= enough["memory"]


EVALUATE = """
import json, sys
asked = json.loads(sys.argv[1])
import waterfill
import waterfill.evaluation.evaluate
from waterfill.base.errors import MemoryLimitError
from waterfill.base import process
memory = asked.get("memory") or process.resident_bytes() + asked["spare"]
said = {"memory": memory, "refused": None, "smallest": None}
try:
    said["kl"] = waterfill.evaluate(*asked["models"], asked["text"], context=64, max_windows=2, memory=memory).kl
except MemoryLimitError as error:
    said |= {"refused": str(error), "smallest": error.smallest_bytes}
print(json.dumps(said | {"peak": process.peak_bytes()}))
"""


def test_an_original_is_held_below_the_limit_as_well(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def x return " * 100)
    asked = {"models": [str(wide), str(wide.parent / "model")], "text": str(tmp_path / "text")}
    refusals, memory, kl = [], 0, None
    while kl is None:
        said = in_process(
            EVALUATE, asked | {"spare": 64 * MB, "memory": memory}, WATERFILL_CACHE=str(tmp_path / "cache")
        )
        assert said["peak"] <= said["memory"], said
        kl = said.get("kl")
        if kl is None:
            assert said["smallest"] + SLACK > memory
            memory = said["smallest"] + SLACK
            refusals.append(said["refused"])
    assert f"are too little for {wide.parent / 'model'}: loading it takes" in refusals[0]
    again = in_process(EVALUATE, asked | {"spare": 64 * MB}, WATERFILL_CACHE=str(tmp_path / "cache"))
    assert again["peak"] <= again["memory"]  # now without the original


def test_original_and_artifact_are_not_held_side_by_side(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("def x return " * 100)
    with pytest.raises(WaterfillError, match="predictions of the first have to be kept on disk; leave out --no-cache"):
        waterfill.evaluate(
            wide, wide.parent / "model", tmp_path / "text", context=64, max_windows=2, memory="64GB", cache=False
        )


@needs_engine
def test_what_leaves_no_room_for_a_text_is_streamed_from_then_on(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, greedy = open_runner(wide, memory="64GB"), Sampling(max_new_tokens=4, temperature=0)
    assert runner.streaming is None
    expected = "".join(runner.generate("def", greedy))
    admit = Limit.admit

    def once(limit: Limit, text: int, prompt: int, **_: Any) -> None:
        monkeypatch.setattr(Limit, "admit", admit)
        Limit(limit.path, 0, limit.working, overhead_bytes=0).admit(text, prompt)

    monkeypatch.setattr(Limit, "admit", once)
    assert "".join(runner.generate("def", greedy)) == expected
    assert runner.streaming is not None
    runner.streaming.close()


# ------------------------------------------------------------------------------------------------- reckoning


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says what the process takes."""
    return lambda size: monkeypatch.setattr(process, "resident_bytes", lambda: size)


WORKING = Working(token=1000, activations=5000, logits=100_000, scores=1, fixed=10_000)


def limited(megabytes: int, **options: Any) -> Limit:
    return Limit(Path("artifact"), megabytes * MB, WORKING, overhead_bytes=0, **options)


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("prompt", [5, 500, 50_000])
def test_what_a_refusal_says_would_do_does(
    resident: Callable[[int], None], prompt: int, drafted: bool, pieces: bool
) -> None:
    resident(50 * MB)
    draft = limited(51) if drafted else None
    with pytest.raises(MemoryLimitError, match=f"51 MB are too little for reading {prompt} tokens") as found:
        limited(51, pieces=pieces).admit(prompt + 1000, prompt, draft=draft)
    smallest = found.value.smallest_bytes // MB
    limited(smallest, pieces=pieces).admit(prompt + 1000, prompt, draft=draft)
    with pytest.raises(MemoryLimitError):
        limited(smallest - 1, pieces=pieces).admit(prompt + 1000, prompt, draft=draft)
    limited(51, pieces=pieces, binding=False).admit(prompt + 1000, prompt, draft=draft)


def test_passes_are_as_wide_as_memory_allows(resident: Callable[[int], None]) -> None:
    resident(50 * MB)
    for megabytes in (51, 60, 100):
        limit = limited(megabytes)
        count = limit.begin_pass(10_000, 1000, logits=1, growth_bytes=500_000)
        free = megabytes * MB - 50 * MB - 500_000
        assert LEAST_PASS < count < 10_000
        assert WORKING.pass_bytes(count, 1000, 1) <= free < WORKING.pass_bytes(count + 1, 1000, 1)
    with pytest.raises(MemoryLimitError, match=r"51 MB are too little for 10000 tokens at a time .* at least"):
        limited(51).begin_pass(10_000, 1000, logits=1, growth_bytes=0, whole=True)


def test_a_draft_gives_back_what_was_set_aside_for_it(resident: Callable[[int], None]) -> None:
    resident(50 * MB)
    limit, draft = limited(60), limited(60)
    limit.admit(2000, 1000, draft=draft)
    before = limit.widest(10_000, 1000)
    draft.begin_pass(1000, 1000, logits=1, growth_bytes=0)
    assert limit.widest(10_000, 1000) == before + 1000 * WORKING.token // (WORKING.activations + 1000)


# ------------------------------------------------------------------------------------------ what cannot be streamed


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of a tiny Llama: losslessly coded, and with nothing but a few packed matrices."""
    root = tmp_path_factory.mktemp("kept")
    checkpoint = models.tiny_llama(root / "model", tokenizer=True)
    waterfill.pack(checkpoint, root / "lossless", lossless=True)
    waterfill.pack(
        checkpoint, root / "mixed", plan=plan_for(checkpoint, budget=Budget(bits=8.0), keep=("*embed*", "lm_head*"))
    )
    return {"lossless": root / "lossless", "mixed": root / "mixed"}


def test_without_packed_matrices_all_is_in_memory_or_refused(kept: dict[str, Path]) -> None:
    path = kept["lossless"]
    tokens, dense = torch.arange(9)[None], waterfill.load(path)
    for options in ({"streamed": True}, {"memory": "64GB", "streamed": True}, {"memory": "64GB"}):
        model = waterfill.load(path, **options)
        assert model.streaming is None
        assert torch.equal(model(tokens).logits, dense(tokens).logits)
    for streamed in (True, False, None):
        with pytest.raises(MemoryLimitError, match=r"1 MB are too little for .* takes [0-9]+ MB at least; give more"):
            waterfill.load(path, memory="1MB", streamed=streamed)


def test_kept_matrices_count_before_anything_is_loaded(
    kept: dict[str, Path], resident: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_artifact(kept["mixed"])
    held = kept_size(artifact)
    assert held > 2 * 8192 * 64 * 2
    resident(50 * MB)
    enough = fit(artifact, 50 * MB + held, working_bytes=0, streamed=True)
    assert enough.streamed
    with pytest.raises(MemoryLimitError, match=r"what is not packed cannot be streamed, so that it takes [0-9]+ MB"):
        fit(artifact, 50 * MB + held - 1, working_bytes=0)
    with pytest.raises(MemoryLimitError, match="all of it is to be in memory"):
        fit(artifact, 50 * MB + held, working_bytes=0, streamed=False)
    monkeypatch.setattr(process, "free_bytes", lambda: float(held - 1))
    with pytest.raises(MemoryLimitError, match="cannot be streamed"):
        fit(artifact, None, working_bytes=0)
    assert not fit(artifact, None, working_bytes=0, streamed=False).streamed


# ------------------------------------------------------------------------------------------------- kinds of models

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {  # and whether a text may be read in pieces
    "Mamba": {"state_size": 8, "pieces": False},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8, "pieces": False},
    "Rwkv": {"attention_hidden_size": 64, "intermediate_size": 128, "pieces": False},
    "RecurrentGemma": {"num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 3, "pieces": False},
    "Bloom": {"n_head": 4, "pieces": True},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "pieces": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_streams(kind: str, tmp_path: Path) -> None:
    options = dict(KINDS[kind])
    pieces = options.pop("pieces")
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    checkpoint = models._save(tmp_path / "model", model_class, config, torch.float32, 1, False, 0)
    waterfill.pack(checkpoint, tmp_path / "packed", plan=plan_for(checkpoint, budget=Budget(bits=5.0)))
    resident = waterfill.load(tmp_path / "packed")
    streamed = streams.load(tmp_path / "packed", tuning=streams.quick(pass_bytes=1))
    assert streamed.memory_limit.pieces == pieces
    tokens = torch.randint(1, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    wanted: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(streamed.generate(tokens, **wanted), resident.generate(tokens, **wanted))
    streamed.streaming.close()


def test_a_trial_finds_keys_values_and_activations(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = try_passes(model)
    assert found.pieces
    assert found.working.token == 1.25 * 3 * 2 * 2 * 16 * 4
    whole = [found.working.pass_bytes(tokens, tokens, 0) for tokens in LENGTHS]
    least = [4 * tokens * (2 * 160 + 64) for tokens in LENGTHS]  # gate, up and the residual are alive together
    assert all(low < size < 8 * low for low, size in zip(least, whole, strict=True))
