"""A small GPT-2, trained on the spot: what holds for the example Llama must hold for another family.

LayerNorm instead of RMSNorm, `Conv1D` weights, learned positions, GELU, biases everywhere. It reads the example model's
tokenizer and learns from the Python standard library's own source, so nothing is downloaded. Training takes some
minutes on a laptop; the checkpoint is kept in the cache folder and trained again only when a setting here changes.

    standard library's source ──tokenise──► one stream of ids ──random windows──► AdamW ──► checkpoint directory
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.shared.report import EXAMPLE_MODEL, STANDARD_LIBRARY_MODULES

# Tests and data tables are no prose; the modules of the stand-in for the held-out text must stay unseen.
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
VOCABULARY = 8192  # of the example model's tokenizer
END_OF_TEXT = 0
LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Training:
    """Everything that decides the weights, up to the rounding of one machine."""

    steps: int = 1000
    sequences: int = 4  # per step
    context: int = 256
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    peak_rate: float = 3e-3
    warmup: int = 50  # steps
    weight_decay: float = 0.1
    seed: int = 0


QUICK = Training(steps=60, warmup=10)


def small_gpt2(training: Training = Training()) -> Path:
    """Directory of the trained checkpoint (bf16, with tokenizer), from the cache or trained now, saying how it goes."""
    settings = repr((sorted(dataclasses.asdict(training).items()), platform.python_version()))
    name = f"small-gpt2-{hashlib.blake2b(settings.encode(), digest_size=6).hexdigest()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waterfill"
    path = cache / name
    if path.is_dir():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        _train(training).save_pretrained(made)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLE_MODEL / file, made)
        shutil.copytree(made, path.with_suffix(".partial"), dirs_exist_ok=True)
    path.with_suffix(".partial").rename(path)
    return path


def _train(training: Training) -> GPT2LMHeadModel:
    """Cross-entropy on windows at random offsets; linear warm-up, then linear decay to zero."""
    stream = _training_stream()
    generator = torch.Generator().manual_seed(training.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = GPT2LMHeadModel(_config(training))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start, losses = time.perf_counter(), []
    for step in range(training.steps):
        fraction = min((step + 1) / training.warmup, (training.steps - step) / (training.steps - training.warmup))
        for group in optimiser.param_groups:
            group["lr"] = training.peak_rate * fraction
        offsets = torch.randint(len(stream) - training.context, (training.sequences, 1), generator=generator)
        ids = stream[offsets + torch.arange(training.context)]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == training.steps:
            recent = math.fsum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
            elapsed_s = time.perf_counter() - start
            print(f"training a small GPT-2: step {step + 1}/{training.steps}, loss {recent:.3f}, {elapsed_s:.0f} s")
    return model.to(torch.bfloat16).eval()


def _config(training: Training) -> GPT2Config:
    return GPT2Config(
        n_embd=training.hidden,
        n_layer=training.layers,
        n_head=training.heads,
        n_positions=training.context,
        vocab_size=VOCABULARY,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        resid_pdrop=0.0,  # each window is seen about once: nothing to regularise
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _training_stream() -> Tensor:
    """Token ids, int64 [tokens], of the standard library's modules in order of their path."""
    library = Path(sysconfig.get_path("stdlib"))
    unseen = {f"{name}.py" for name in STANDARD_LIBRARY_MODULES.split()}
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    chosen = sorted(path for path in paths if not LEFT_OUT & set(path.parts) and str(path) not in unseen)
    sources = [(library / path).read_text("utf-8", errors="replace") for path in chosen]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    encoded = tokenizer(sources, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, END_OF_TEXT)], dtype=torch.int64)
