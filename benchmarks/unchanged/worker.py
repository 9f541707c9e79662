"""What `unchanged.py` runs in processes of its own: small random models, hashes of what models compute, commands.

    python benchmarks/unchanged/worker.py models FOLDER [--others]   checkpoints of several families
    python benchmarks/unchanged/worker.py shards MODEL PLAN OUT      pack by a plan with a new size of shards
    python benchmarks/unchanged/worker.py names                      what `import waterfill` offers, with its parameters
    python benchmarks/unchanged/worker.py calls MODEL                what the functions say of bad arguments
    python benchmarks/unchanged/worker.py computed ARTIFACT ...      a line per way to run each of them
    python benchmarks/unchanged/worker.py serve                      a command per line of standard input

It knows waterfill by its public names only. A hash is of the logits' bytes as they come: another bit, another line.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import inspect
import json
import os
import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING or sys.argv[1:] != ["serve"]:
    import waterfill

IDS = [[17, 400, 23, 5, 901, 64, 8, 8, 77, 3000, 12, 255, 1, 6, 42, 19]]
PROMPT = "def read(path):\n    return open(path"
VOCABULARY = 8192  # of the example's tokenizer


# -------------------------------------------------------------------------------------------------------------- models


def make_models(folder: Path, *, others: bool) -> None:
    """`qwen`, or `gpt2`, `moe` and `wide`, beside the example model in `folder/ref`, whose tokenizer they share."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if not others:
        _save(folder, "qwen", transformers.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True))
        return
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
    _save(folder, "gpt2", transformers.GPT2Config(vocab_size=VOCABULARY, **gpt2), shard="200KB")
    _save(folder, "moe", transformers.MixtralConfig(**sizes, num_local_experts=4))
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
    _save(folder, "wide", transformers.LlamaConfig(**{**sizes, **large, "num_key_value_heads": 12}))


def _save(folder: Path, name: str, config: Any, shard: str = "4GB") -> None:
    """Weights depend on the config alone, and are large enough for predictions that are far from uniform."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.add_(torch.randn_like(parameter), alpha=fan_in**-0.5)
    model.save_pretrained(folder / name, max_shard_size=shard)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "ref" / file, folder / name / file)


def pack_in_shards(model: str, plan: str, out: str) -> None:
    """A plan with other shards than it was made with has another size: the one that the refusal names."""
    try:
        waterfill.pack(model, out, plan=plan)
    except waterfill.WaterfillError as error:
        print(error)
        size = re.findall(r"[\d,]*\d", str(error))[-1].replace(",", "")
        Path(plan).write_text(json.dumps(json.loads(Path(plan).read_text()) | {"size_bytes": int(size)}))
    waterfill.pack(model, out, plan=plan)


# --------------------------------------------------------------------------------------------------------------- names


def names() -> Iterator[str]:
    for name in sorted(waterfill.__all__):
        yield f"{name}: {_described(getattr(waterfill, name))}"


def _described(thing: Any) -> str:
    """Parameters and their defaults, the bases of a class and what it has; not where they are defined."""
    if not callable(thing):
        return type(thing).__name__
    try:
        shown = ", ".join(
            f"{each.kind.name.lower()} {each.name}"
            + ("" if each.default is inspect.Parameter.empty else f"={each.default!r}")
            for each in inspect.signature(thing).parameters.values()
        )
    except ValueError:
        shown = "?"
    if not inspect.isclass(thing):
        return f"({shown})"
    bases = [
        base.__name__
        for base in thing.__mro__[1:-1]
        if base.__name__ in waterfill.__all__ or base.__module__ == "builtins"
    ]
    return f"({shown}) is {bases}, has {sorted(name for name in dir(thing) if not name.startswith('_'))}"


def refused_calls(model: str) -> Iterator[str]:
    """Bad arguments of the functions: the class of the error and its sentence."""
    calls: dict[str, Callable[[], Any]] = {
        "plan(3)": lambda: waterfill.plan(3, bits=3),  # type: ignore[arg-type]
        "plan(bits='3')": lambda: waterfill.plan(model, bits="3"),  # type: ignore[arg-type]
        "plan()": lambda: waterfill.plan(model),
        "plan(bit=3)": lambda: waterfill.plan(model, bit=3),  # type: ignore[call-arg]
        "plan(purpose='speed')": lambda: waterfill.plan(model, bits=3, purpose="speed"),  # type: ignore[arg-type]
        "plan(keep='a')": lambda: waterfill.plan(model, bits=3, keep="a"),
        "pack(plan=3)": lambda: waterfill.pack(model, "never", plan=3),  # type: ignore[arg-type]
        "load(missing)": lambda: waterfill.load("missing"),
        "load(checkpoint)": lambda: waterfill.load(model),
        "load(memory='1XB')": lambda: waterfill.load("missing", memory="1XB"),
        "Engine(missing)": lambda: waterfill.Engine("missing"),
        "Engine(memory=[])": lambda: waterfill.Engine("missing", memory=[]),  # type: ignore[arg-type]
        "inspect(missing)": lambda: waterfill.inspect("missing"),
        "seal(checkpoint)": lambda: waterfill.seal(model),
        "evaluate()": lambda: waterfill.evaluate(model),
        "evaluate(convention)": lambda: waterfill.evaluate(model, text="text.py", convention="own"),
        "sensitivity(sequences=0)": lambda: waterfill.sensitivity(model, sequences=0),
        "report(missing)": lambda: waterfill.report("missing"),
        "compare(missing)": lambda: waterfill.compare(model, "missing.txt"),
        "generate(3)": lambda: waterfill.generate(3, 4, "x"),
    }
    for name, call in calls.items():
        yield f"{name}: {_result(call)}"


# ------------------------------------------------------------------------------------------------------------ computed


def computed(artifact: str) -> Iterator[str]:
    """Logits of fixed ids, and greedy texts, of every way to run an artifact."""
    loaded = {
        "load": lambda: waterfill.load(artifact),
        "load, float32": lambda: waterfill.load(artifact, dtype=torch.float32),
        "load, streamed": lambda: waterfill.load(artifact, streamed=True),
        "from_pretrained": lambda: transformers.AutoModelForCausalLM.from_pretrained(artifact),
    }
    for way, load in loaded.items():
        yield f"{artifact}, {way}: {_result(lambda load=load: _logits(load()))}"  # type: ignore[misc]
    yield f"{artifact}, load, text: {_result(lambda: _text_of_model(artifact))}"
    for streamed in (False, True):
        yield f"{artifact}, engine, streamed={streamed}: {_result(lambda s=streamed: _text_of_engine(artifact, s))}"  # type: ignore[misc]


def _result(call: Callable[[], Any]) -> str:
    """What it returns, or the class and the sentence of what it raises."""
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _logits(model: Any) -> str:
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    data = logits.float().contiguous().numpy().tobytes()
    return f"{logits.dtype} {tuple(logits.shape)} {hashlib.sha256(data).hexdigest()}"


def _text_of_model(artifact: str) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact)
    pieces = waterfill.generate(waterfill.load(artifact), tokenizer, PROMPT, temperature=0, max_new_tokens=16)
    return repr("".join(pieces))


def _text_of_engine(artifact: str, streamed: bool) -> str:
    engine = waterfill.Engine(artifact, streamed=streamed)
    texts = [
        "".join(engine.generate(PROMPT, max_new_tokens=16, **options))
        for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0, "lookup": 3})
    ]
    return f"{texts!r}, streaming {engine.streaming is not None}"


# --------------------------------------------------------------------------------------------------------------- serve


def serve() -> None:
    """Run commands in forks of this process, which has imported torch and transformers already, and waterfill not.

    A request is a line of JSON: `arguments` (the script first), `environment`, and files for `typed`, `out` and `err`.
    The answer is a line with the exit status. A fork ends once its streams are written: to take torch apart takes a
    second.
    """
    import_module("transformers.models.llama.modeling_llama")  # with it comes what takes longest
    gc.freeze()
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    os.environ.update(request["environment"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name in enumerate(("typed", "out", "err")):
        os.dup2(os.open(request[name], os.O_RDONLY if name == "typed" else flags), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.argv = request["arguments"]
    status: int | str | None = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def main() -> None:
    task, *given = sys.argv[1:]
    if task == "serve":
        serve()
        return
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if task == "models":
        make_models(Path(given[0]), others="--others" in given)
    if task == "shards":
        pack_in_shards(*given)
    lines = {"names": names, "calls": lambda: refused_calls(given[0])}
    if task in lines:
        print(*lines[task](), sep="\n")
    if task == "computed":
        for artifact in given:
            print(*computed(artifact), sep="\n")


if __name__ == "__main__":
    main()
