"""waterfill's side of `streaming.py`: one artifact, run in a process of its own, under limits set from outside.

    request, a JSON object on standard input ──► open_model(artifact, memory=…) ──► tokens ──► answer, one JSON line

`pass_seconds` and `answering` serve the peers (`stream_peers.py`); the former needs torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from benchmarks.shared.limits import process_memory

Request = dict[str, Any]


@dataclass(frozen=True)
class Passes:
    """One greedy generation, pass by pass over the weights."""

    ids: list[int]  # that were generated
    seconds: list[float]  # from the start of a pass to the start of the next, or to the end; the prompt's first


def pass_seconds(model: Any, prompt: Sequence[int], tokens: int, **options: Any) -> Passes:
    """Greedy generation of exactly so many tokens by a transformers model."""
    import torch

    model.generation_config.eos_token_id = None
    starts: list[float] = []
    hook = model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    ids = torch.tensor([prompt])
    try:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
    finally:
        hook.remove()
    starts.append(time.perf_counter())
    return Passes(out[0, len(prompt) :].tolist(), [b - a for a, b in pairwise(starts)])


def answering(work: Callable[[Request], Request]) -> None:
    """Answer the request on standard input: what `work` returns, or its error, and the peak of resident memory, unless
    that is in the answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; the answer stays clean
    try:
        answer = work(json.load(sys.stdin))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "smallest_bytes": getattr(error, "smallest_bytes", None)}
    answers.write(json.dumps({"peak_bytes": peak_bytes(), **answer}) + "\n")
    answers.flush()


def peak_bytes() -> int | None:
    return process_memory("self").get("VmHWM")


def note_passes(model: Any) -> list[float]:
    """When passes of a model of the engine's begin, from now on."""
    starts, forward = list[float](), model.forward

    def noted(*given: Any) -> Any:
        starts.append(time.perf_counter())
        return forward(*given)

    model.forward = noted
    return starts


def engine_passes(model: Any, starts: list[float], prompt: Sequence[int], tokens: int, drafter: Any) -> Passes:
    """Greedy generation of exactly so many tokens by the engine, of a text of its own."""
    from waterfill.running.text.generation import Run
    from waterfill.running.text.next_token import Rules

    starts.clear()
    run = Run(model.sequence(), list(prompt), tokens, Rules.greedy(), frozenset(), drafter, seed=0)
    ids = [token for new in run.tokens() for token in new]
    return Passes(ids, [b - a for a, b in pairwise([*starts, time.perf_counter()])])


def stream(request: Request) -> Request:
    """Generate from every prompt. With `memory` null all of the artifact is loaded; a `draft` always is.

    `keep` false streams everything, however much memory is left: what a small model needs to stand for a large one.
    `form` is of weights in memory; "auto" without it.
    """
    importlib.import_module("waterfill.running.text.generation")  # before memory is looked at
    from waterfill.running.engine.opening import open_model
    from waterfill.running.streaming.residency import choose_residency
    from waterfill.running.streaming.tuning import USUAL
    from waterfill.running.text.next_token import Rules
    from waterfill.running.text.speculate import DraftModel, Lookup

    drafter: Any = None
    if request.get("lookup"):
        drafter = Lookup(request["lookup"])
    if request.get("draft"):
        drafter = DraftModel(open_model(request["draft"], verify=False).sequence(), Rules.greedy())
    keep = request.get("keep", True)
    tuning = (
        USUAL
        if keep
        else replace(USUAL, choose_residency=lambda chunks, _, speeds: choose_residency(chunks, 0, speeds))
    )
    start, start_bytes = time.perf_counter(), peak_bytes()
    model = open_model(
        request["artifact"],
        verify=False,
        memory=request["memory"],
        memory_form=request.get("form", "auto"),
        streamed=None if keep else True,
        tuning=tuning,
    )
    load_s, load_bytes = time.perf_counter() - start, peak_bytes()
    starts = note_passes(model)
    generations = [
        vars(engine_passes(model, starts, prompt, request["tokens"], drafter)) for prompt in request["prompts"]
    ]
    answer: Request = {"load_s": load_s, "generations": generations, "summary": None, "stages": None}
    answer |= {"start_bytes": start_bytes, "load_bytes": load_bytes}
    if model.streaming is not None:
        answer["summary"] = model.streaming.summary().to_dict()
        answer["peak_bytes"] = peak_bytes()  # measuring the stages takes memory of its own
        if request.get("stages"):
            from benchmarks.streaming.measure import measure_stages

            sequence = model.sequence()
            answer["stages"] = measure_stages(model.streaming, lambda: sequence.forward([1]))
        model.streaming.close()
    return answer


if __name__ == "__main__":
    answering(stream)
