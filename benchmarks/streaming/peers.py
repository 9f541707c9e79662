"""Other libraries' ways of running a model larger than memory: one of them in a process of its own, under limits.

    accelerate    a bf16 checkpoint, every module offloaded to disk: safetensors are mapped where they lie
    airllm        the same checkpoint split into a file per layer, which is done once beforehand
    llama.cpp     a GGUF file, mapped; or read whole, with direct I/O or without
    gguf          writes such a file of random weights, and measures the error of its type

A JSON object on standard input, one JSON line as answer. It needs the library that it is asked for, and of
waterfill what needs nothing itself (`files.gguf`, `files.ggml`): any interpreter that has the library will do.
"""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.streaming.worker import Request, answering, pass_seconds

BATCH = 32  # tokens of a prompt that llama.cpp takes at once: buffers grow with it


def accelerate(request: Request) -> Request:
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=request["folder"]
    ).eval()
    return _generated(request, model, start, "accelerate")


def airllm(request: Request) -> Request:
    from airllm import AutoModel

    start = time.perf_counter()
    model = AutoModel.from_pretrained(request["model"], device="cpu", layer_shards_saving_path=request["folder"])
    return _generated(request, model.model, start, "airllm")


def _generated(request: Request, model: Any, start: float, package: str) -> Request:
    load_s = time.perf_counter() - start
    if not request["tokens"]:
        return {"load_s": load_s, "seconds": [], "version": metadata.version(package)}
    passes = pass_seconds(model, request["prompt"], request["tokens"])
    return {"load_s": load_s, "seconds": passes.seconds, "version": metadata.version(package)}


def llama_cpp(request: Request) -> Request:
    """Seconds of the prompt, then of each token."""
    from benchmarks.peers.ggml import LlamaCpp

    peer, name, prompt = LlamaCpp(), Path(request["model"]).stem, len(request["prompt"])
    start = time.perf_counter()
    peer.open(name, request["model"], request["threads"], batch=BATCH, mode=request["mode"])
    load_s = time.perf_counter() - start
    start = time.perf_counter()
    seconds = peer.decode(name, prompt, request["tokens"] - 1)
    prompt_s = time.perf_counter() - start - sum(seconds)
    return {"load_s": load_s, "seconds": [prompt_s, *seconds], "version": metadata.version("llama-cpp-python")}


def gguf(request: Request) -> Request:
    from benchmarks.peers.ggml import bits_per_weight, relative_error, write_model

    kind = request["kind"]
    with Path(request["out"]).open("wb") as file:
        write_model(file, kind, request["shapes"])
    return {"bits": bits_per_weight(kind), "t2": relative_error(kind)}


PEERS = {"accelerate": accelerate, "airllm": airllm, "llama.cpp": llama_cpp, "gguf": gguf}


if __name__ == "__main__":
    answering(lambda request: PEERS[request["peer"]](request))
