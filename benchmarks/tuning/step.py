"""`python -m benchmarks.tuning.step MODEL TOKENS RANK`: two steps of an adapter, and the peak of memory they take.

A process of its own, so that nothing but the model and its step is in it. What is imported does not count.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from waterfill.base.process import peak_bytes, release, resident_bytes

STEPS = 2  # the second has the optimizer's moments


def peak_of_step(model: Path, tokens: int, rank: int) -> int:
    """Bytes beyond what imports take, of a checkpoint in float32 or an artifact."""
    command = [sys.executable, "-m", "benchmarks.tuning.step", str(model), str(tokens), str(rank)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main(model: Path, tokens: int, rank: int) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers.models.llama import modeling_llama  # noqa: F401  # what loading would import

    import waterfill
    from waterfill.running.hf import attach  # noqa: F401

    imported = resident_bytes()
    if (model / "waterfill.json").exists():
        loaded: Any = waterfill.load(model, dtype=torch.float32, verify=False)
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted: Any = get_peft_model(loaded, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.train()
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    release()  # what loading has left to the allocator
    forget_peak()
    for _ in range(STEPS):
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(peak_bytes() - imported)


def forget_peak() -> None:
    """Linux: the peak of what follows, without that of loading."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
