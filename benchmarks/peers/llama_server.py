"""llama.cpp's models through the server that xllamacpp has inside: it says itself how long reading and writing took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.ggml import write_model

FIRST_ID = 300  # of a prompt
CONTEXT = 1024


class LlamaServer:
    """Whole models of Llama shapes, as `benchmarks.peers.ggml.LlamaCpp` has them."""

    def __init__(self) -> None:
        import xllamacpp

        self._api = xllamacpp
        self._models: dict[str, Any] = {}

    def load(self, kind: str, shapes: dict[str, Any], folder: str, threads: int) -> dict[str, int]:
        """Write a model of random weights, all matrices of one type, and load it; the bytes of its matrices."""
        path = Path(folder) / f"{kind}.gguf"
        with path.open("wb") as file:
            size_bytes = write_model(file, kind, shapes, words=True)
        self._models.pop(kind, None)  # its memory goes first
        options = self._api.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.verbosity = CONTEXT, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        self._models[kind] = self._api.Server(options)
        path.unlink()  # mapped by now, if it is wanted
        return {"size_bytes": size_bytes}

    def decode(self, kind: str, prompt: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` tokens after a prompt of so many, greedily: what they took on average."""
        timings = self._timings(kind, prompt, tokens)
        return [float(timings["predicted_per_token_ms"]) / 1e3] * tokens

    def prefill(self, kind: str, tokens: int) -> float:
        """Seconds that a prompt takes."""
        return float(self._timings(kind, tokens, 1)["prompt_ms"]) / 1e3

    def _timings(self, kind: str, prompt: int, tokens: int) -> dict[str, Any]:
        wanted = {
            "prompt": list(range(FIRST_ID, FIRST_ID + prompt)),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = self._models[kind].handle_completions(wanted)
        if isinstance(answer, str | bytes):
            answer = json.loads(answer)
        timings: dict[str, Any] = answer["timings"]
        if timings["prompt_n"] != prompt or timings["predicted_n"] != tokens:
            raise RuntimeError(f"llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}")
        return timings
