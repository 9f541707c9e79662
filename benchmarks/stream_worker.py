"""waterfill's side of `streaming.py`: one artifact, run in a process of its own, under limits set from outside.

    request, a JSON object on standard input ──► load(artifact, memory=…) ──► generate ──► answer, one JSON line

`pass_seconds` and `answering` serve the peers too (`stream_peers.py`), and need torch alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from limits import process_memory

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
    """Answer the request on standard input: what `work` returns and the peak of resident memory, or its error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like; the answer stays clean
    try:
        answer = work(json.load(sys.stdin))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "smallest_bytes": getattr(error, "smallest_bytes", None)}
    peak = process_memory("self").get("VmHWM")
    answers.write(json.dumps({**answer, "peak_bytes": peak}) + "\n")
    answers.flush()


def stream(request: Request) -> Request:
    """Generate from every prompt. With `memory` null all of the artifact is loaded; a `draft` always is.

    `keep` false streams everything, however much memory is left: what a small model needs to stand for a large one.
    """
    import waterfill

    options: dict[str, Any] = {}
    if request.get("lookup"):
        options["prompt_lookup_num_tokens"] = request["lookup"]
    if request.get("draft"):
        from waterfill.runtime.generate import drafted_by

        options |= drafted_by(waterfill.load(request["draft"], verify=False))
    if not request.get("keep", True):
        from waterfill.streaming import streamer

        choose = streamer.choose
        streamer.choose = lambda chunks, _, speeds: choose(chunks, 0, speeds)
    limit = {} if request["memory"] is None else {"memory": request["memory"]}
    start = time.perf_counter()
    model = waterfill.load(request["artifact"], verify=False, **limit)
    load_s = time.perf_counter() - start
    generations = [vars(pass_seconds(model, prompt, request["tokens"], **options)) for prompt in request["prompts"]]
    answer: Request = {"load_s": load_s, "generations": generations, "summary": None, "stages": None}
    if limit:
        answer["summary"] = model.streaming.summary().to_dict()
        if request.get("stages"):
            from waterfill.streaming import measure_stages

            answer["stages"] = measure_stages(model)
        model.streaming.close()
    return answer


if __name__ == "__main__":
    answering(stream)
