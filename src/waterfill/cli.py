"""The command line: parse, call the Python function of the same name, print. Nothing else happens here.

With `--json` a command prints one JSON object on standard output (docs/cli.md). Progress and logs go to standard error.
Errors are one sentence; exit code 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from waterfill.errors import WaterfillError

app = typer.Typer(
    help="Fit a large language model into a byte budget, know the loss before you run it, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(help="Local Hugging Face directory or hub id.")]
Artifact = Annotated[Path, typer.Argument(help="Directory that `waterfill pack` wrote.")]
Size = Annotated[str | None, typer.Option(help="Budget: bytes of all weight files, e.g. 2.5GB or 800MiB.")]
Bits = Annotated[float | None, typer.Option(help="Budget: stored bits per weight of the matrices, scales included.")]
MaxKl = Annotated[float | None, typer.Option(help="Smallest artifact within this predicted loss, nats per token.")]
GainOption = Annotated[str, typer.Option(help="Reconstruction gain: auto (from alpha and beta), mse or unbiased.")]
Keep = Annotated[list[str] | None, typer.Option(help="Keep matching tensors in full precision (glob; repeatable).")]
Tie = Annotated[
    list[str] | None,
    typer.Option(help="Same codec for matching matrices of one module, e.g. '*.q_proj,*.k_proj,*.v_proj'."),
]
Uniform = Annotated[bool, typer.Option("--uniform", help="The same codec for every matrix, for comparison.")]
Codec = Annotated[
    list[str] | None, typer.Option(help="Restrict the menu to this codec, e.g. higgs-p2-n16 (repeatable).")
]
ProbeKind = Annotated[
    str, typer.Option(help="Measure sensitivities on text from the model itself (self) or random tokens.")
]
Text = Annotated[Path | None, typer.Option(help="Measure sensitivities on this text file instead.")]
Sequences = Annotated[int, typer.Option(help="Sequences of the probe.", min=2)]
Length = Annotated[int, typer.Option(help="Tokens per sequence of the probe.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed; the same seed gives the same bytes.")]
MethodOption = Annotated[str, typer.Option(help="Sensitivity estimator: fisher, or perturb (slow, for checking).")]
SensitivityFile = Annotated[Path | None, typer.Option("--sensitivity", help="Reuse a sensitivity file.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[bool, typer.Option("--all", help="One line per matrix, however many there are.")]


@app.command()
def plan(
    model: Model,
    size: Size = None,
    bits: Bits = None,
    max_kl: MaxKl = None,
    gain: GainOption = "auto",
    keep: Keep = None,
    tie: Tie = None,
    uniform: Uniform = False,
    codec: Codec = None,
    probe: ProbeKind = "self",
    text: Text = None,
    sequences: Sequences = 32,
    length: Length = 512,
    seed: Seed = 0,
    method: MethodOption = "fisher",
    sensitivity: SensitivityFile = None,
    revision: Revision = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan here, and the sensitivities beside it.")] = None,
    every: Verbose = False,
    as_json: Json = False,
) -> None:
    """Dry run: what each tensor would get, what that weighs and what it is predicted to cost. Writes nothing."""
    import waterfill
    from waterfill.show import plan_view

    options = _plan_options(locals())
    with _progress() as progress:
        made = waterfill.plan(model, save=save, progress=progress, **options)
    if as_json:
        _print_json(_plan_record(made))
    else:
        out.print(plan_view(made, every=every))


@app.command()
def pack(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; must not exist.")],
    size: Size = None,
    bits: Bits = None,
    max_kl: MaxKl = None,
    gain: GainOption = "auto",
    keep: Keep = None,
    tie: Tie = None,
    uniform: Uniform = False,
    codec: Codec = None,
    probe: ProbeKind = "self",
    text: Text = None,
    sequences: Sequences = 32,
    length: Length = 512,
    seed: Seed = 0,
    method: MethodOption = "fisher",
    sensitivity: SensitivityFile = None,
    revision: Revision = None,
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan (from `plan --save`); no budget then.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new one is complete.")] = False,
    every: Verbose = False,
    as_json: Json = False,
) -> None:
    """Pack a model into a budget. An interrupted run is continued by the same command."""
    import waterfill
    from waterfill.show import plan_view

    options = _plan_options(locals())
    if plan is not None and any(limit is not None for limit in (size, bits, max_kl)):
        raise WaterfillError(f"{plan} has its own budget; give either --plan or one of --size, --bits and --max-kl")
    with _progress() as progress:
        made = waterfill.pack(model, output, plan=plan, overwrite=overwrite, progress=progress, **options)
    if as_json:
        _print_json({"path": str(output), **_plan_record(made)})
    else:
        out.print(plan_view(made, every=every))
        out.print(f"wrote {output}", style="bold")


@app.command()
def inspect(artifact: Artifact, every: Verbose = False, as_json: Json = False) -> None:
    """What is in an artifact, per tensor; every byte is checked on the way."""
    import waterfill
    from waterfill.show import inspection_view

    found = waterfill.inspect(artifact)
    if as_json:
        record = _plan_record(found.plan)
        for tensor in record["tensors"]:
            tensor["t2_measured"] = found.measured_t2.get(tensor["name"])
        _print_json({"path": str(artifact), **record})
    else:
        out.print(inspection_view(found, every=every))


@app.command(name="eval")
def evaluate(
    artifact: Artifact,
    against: Annotated[str, typer.Option(help="The model it was packed from.")],
    text: Annotated[Path, typer.Option(help="Text file to measure on.")],
    context: Annotated[int | None, typer.Option(help="Tokens per window; default 2048, or the model's limit.")] = None,
    windows: Annotated[int | None, typer.Option(help="Measure on the first windows only.", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 1,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement on a text, beside the prediction."""
    import waterfill
    from waterfill.show import evaluation_view

    with _progress() as progress:
        result = waterfill.evaluate(
            artifact,
            against,
            text,
            context=context,
            max_windows=windows,
            batch=batch,
            revision=revision,
            progress=progress,
        )
    if as_json:
        _print_json(asdict(result))
    else:
        out.print(evaluation_view(result))


MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own setting.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens; 0 for all.")]
Penalty = Annotated[float | None, typer.Option(help="Repetition penalty; 1 is none.")]
SampleSeed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]


@app.command()
def generate(
    artifact: Artifact,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: SampleSeed = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming the text."""
    import waterfill

    sampling = _sampling(locals())
    model, tokenizer = _load(artifact)
    with contextlib.closing(waterfill.generate(model, tokenizer, prompt, sampling)) as stream:
        if as_json:
            _print_json({"prompt": prompt, "text": "".join(stream), **_stats(stream)})
            return
        out.print(prompt, end="", style="dim", markup=False)
        _stream(stream)


@app.command()
def chat(
    artifact: Artifact,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: SampleSeed = None,
) -> None:
    """Talk to a packed model. An empty line or Ctrl-D ends the conversation."""
    import waterfill

    sampling = _sampling(locals())
    model, tokenizer = _load(artifact)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = out.input("[bold]> [/bold]")
        except EOFError:
            said = ""
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        with contextlib.closing(waterfill.generate(model, tokenizer, messages, sampling)) as stream:
            messages.append({"role": "assistant", "content": _stream(stream)})


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import waterfill

        out.print(f"waterfill {waterfill.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one sentence (or one JSON object) and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)])
    for noisy in ("httpx", "huggingface_hub", "transformers", "filelock"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except WaterfillError as error:
        code = _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        code = error.exit_code
        err.print(error.format_message())
    except click.ClickException as error:
        code = _fail(f"{error.format_message()} Try --help.")
    except (KeyboardInterrupt, click.Abort):
        err.print("interrupted", style="yellow")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str) -> int:
    if "--json" in sys.argv:
        _print_json({"error": sentence})
    else:
        err.print("error: ", style="bold red", end="")
        err.print(sentence, markup=False, soft_wrap=True)
    return 2


def _plan_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The command's arguments as the keywords of `waterfill.plan`."""
    for name, allowed in (
        ("gain", ("auto", "mse", "unbiased")),
        ("probe", ("self", "random")),
        ("method", ("fisher", "perturb")),
    ):
        if arguments[name] not in allowed:
            raise WaterfillError(f"--{name} {arguments[name]!r} is unknown; choose one of {', '.join(allowed)}")
    same = ("size", "bits", "max_kl", "gain", "uniform", "probe", "text", "sequences", "length", "seed", "method")
    options = {name: arguments[name] for name in (*same, "sensitivity", "revision")}
    return options | {
        "keep": arguments["keep"] or (),
        "tie": arguments["tie"] or (),
        "codecs": arguments["codec"] or (),
    }


def _sampling(arguments: dict[str, Any]) -> Any:
    from waterfill.runtime.generate import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    return Sampling(**{name: arguments[name] for name in names})


def _load(artifact: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    import waterfill

    _quiet_transformers()
    model = waterfill.load(artifact)
    return model, AutoTokenizer.from_pretrained(artifact)


def _stream(stream: Any) -> str:
    pieces = []
    for piece in stream:
        pieces.append(piece)
        out.print(piece, end="", markup=False, soft_wrap=True)
    out.print()
    stats = stream.stats
    err.print(
        f"{stats.tokens} tokens, first after {stats.first_token_s:.2f} s, {stats.tokens_per_second:.1f} tokens/s",
        style="dim",
    )
    return "".join(pieces)


def _stats(stream: Any) -> dict[str, Any]:
    return {**asdict(stream.stats), "tokens_per_second": stream.stats.tokens_per_second}


def _plan_record(plan: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(plan.to_json())
    return record


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, default=str))


def _quiet_transformers() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A progress bar with an ETA per stage, on standard error; yields the callback."""
    _quiet_transformers()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield step


if __name__ == "__main__":
    main()
