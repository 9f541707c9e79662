"""The command line: parse, call the Python function of the same name, print. Nothing else happens here.

Results go to standard output: a table, or with `--json` one object (docs/cli.md). Progress, logs and errors go to
standard error, with `--json` as events. An error is one sentence (with `--json`, an object), and exit code 2.

Help and usage errors are quick: what imports torch or transformers, which take seconds, is imported by the commands.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from waterfill.base import interrupts
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.version import __version__
from waterfill.cli import console, events, prune, run, study, tune
from waterfill.cli.commands import FILE, PATH, OrderedGroup, combined, memory_form, plan_purpose_option, rate_option
from waterfill.cli.progress import shown
from waterfill.cli.show import doctor as show_doctor
from waterfill.cli.show import evaluation as show_evaluation
from waterfill.cli.show import plan as show_plan
from waterfill.cli.stages import duration

_model = click.argument("model")
_artifact = click.argument("artifact", type=PATH)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_all = click.option("--all", "every", is_flag=True, help="One line per matrix, however many there are.")
_revision = click.option("--revision", help="Branch, tag or commit of a hub model.")

# What is not given is not passed on: the defaults are those of the Python functions.
_plan_options = combined(
    click.option("--size", help="Bytes of all weight files, e.g. 2.5GB or 800MiB."),
    click.option("--bits", type=float, metavar="X", help="Stored bits per weight of the matrices, scales included."),
    click.option(
        "--rates",
        metavar="X,Y,…",
        help="Stored bits per weight, several: one artifact that can be read at any of them, e.g. 2.2,3,4.5.",
    ),
    click.option(
        "--max-kl",
        type=float,
        metavar="X",
        help="The smallest artifact within this predicted loss, in nats per token; with --for stream the fastest.",
    ),
    click.option(
        "--speed",
        type=float,
        metavar="N",
        help="With --for memory or stream: least loss with so many tokens per second at least, on this machine, as far "
        "as the weights' products go.",
    ),
    click.option("--lossless", is_flag=True, help="Keep every bit: weights are coded, not quantised."),
    click.option(
        "--gain",
        type=click.Choice(["auto", "mse", "unbiased"]),
        help="Gain of the reconstruction; auto (default) follows from the sensitivities.",
    ),
    click.option("--keep", metavar="GLOB", multiple=True, help="Keep matching tensors in full precision. Repeatable."),
    click.option(
        "--tie",
        metavar="GLOBS",
        multiple=True,
        help="One codec for the matching matrices of a module, e.g. '*.q_proj,*.k_proj,*.v_proj'. Repeatable.",
    ),
    plan_purpose_option,
    click.option(
        "--disk",
        metavar="SPEED",
        help="With --for stream: bytes per second of storage, e.g. 0.5GB/s; measured (default): of the model's files.",
    ),
    click.option("--uniform", is_flag=True, help="One codec for all matrices, for comparison."),
    click.option(
        "--codec",
        "codecs",
        metavar="NAME",
        multiple=True,
        help="Choose from these codecs only: a name, a pattern, 'bitshift', 'trellis', or 'fast': grids of single "
        "weights, and of pairs with up to 256 points, which AVX2, AVX-512 and NEON look up in vector registers (above "
        "4 bits AVX2 is several times slower). Repeatable.",
    ),
    click.option(
        "--probe",
        type=click.Choice(["self", "random"]),
        help="Measure on text sampled from the model itself (default), or on random tokens.",
    ),
    click.option("--text", type=FILE, help="Measure on this text instead."),
    click.option("--precision", metavar="SHARE", help="Measure until the predicted loss is known to ± this (10%)."),
    click.option("--quick", is_flag=True, help="Measure on four short sequences: a first idea, of a wide interval."),
    click.option("--sequences", type=int, metavar="N", help="Sequences to measure on, instead of a precision."),
    click.option("--length", type=int, metavar="N", help="Tokens per sequence (160)."),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same bytes (0)."),
    click.option(
        "--method",
        type=click.Choice(["fisher", "perturb"]),
        help="Estimator: fisher (default), or perturb, hundreds of times slower, to check it.",
    ),
    click.option(
        "--sensitivity",
        type=FILE,
        help="Reuse what an earlier `plan --save` measured, of this model or of a smaller one like it; or a table.",
    ),
    click.option(
        "--alpha",
        type=click.Choice(["measured", "uniform"]),
        help="uniform: measure nothing, every weight counts the same.",
    ),
    click.option(
        "--feedback",
        type=click.Choice(["auto", "none"]),
        help="auto (default): round so that errors make up for one another in what matrices are multiplied with.",
    ),
    click.option(
        "--calibrate",
        metavar="TEXT",
        help="What that is known by: the model's own text ('self', as by default), or this file.",
    ),
    click.option("--calibration-tokens", type=int, metavar="N", help="Of that text, about (16384)."),
    click.option("--no-cache", is_flag=True, help="Keep nothing of the measurement on disk, and use nothing kept."),
    _revision,
)


@click.group(cls=OrderedGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def commands(ctx: click.Context) -> None:
    """Fit a large language model into a byte budget, know the loss before you run it, and run it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@commands.command()
@_model
@_plan_options
@click.option("--save", type=PATH, help="Write the plan to this file, and the sensitivities beside it.")
@_all
@_json
def plan(model: str, save: Path | None, every: bool, as_json: bool, **options: Any) -> None:
    """Dry run: what each tensor would get, weigh and cost.

    MODEL is a local Hugging Face directory or a hub id.
    """
    from waterfill import api

    start_s = time.perf_counter()
    with shown() as progress:
        made = api.plan(model, save=save, progress=progress, **console.given(options))
    if as_json:
        console.print_json(show_plan.plan_record(made))
    else:
        console.out().print(show_plan.plan_view(made, every=every))
    console.note(f"planned in {duration(time.perf_counter() - start_s)}")
    if save:
        beside = "" if made.lossless else f", the sensitivities as {save.with_suffix('.sensitivity.json')}"
        console.note(f"saved as {save}{beside}")


@commands.command()
@_model
@click.argument("out", type=PATH)
@_plan_options
@click.option("--plan", "plan_file", type=FILE, help="Carry out this plan, of `plan --save`, instead of a budget.")
@click.option("--overwrite", is_flag=True, help="Replace OUT once the new one is complete.")
@_all
@_json
def pack(
    model: str, out: Path, plan_file: Path | None, overwrite: bool, every: bool, as_json: bool, **options: Any
) -> None:
    """Pack MODEL into the directory OUT, within a budget. The same command continues an interrupted run.

    MODEL is a local Hugging Face directory or a hub id.
    """
    from waterfill import api

    start_s = time.perf_counter()
    with shown() as progress:
        made = api.pack(model, out, plan=plan_file, overwrite=overwrite, progress=progress, **console.given(options))
    if as_json:
        console.print_json({"path": str(out), **show_plan.plan_record(made)})
    else:
        console.out().print(show_plan.plan_view(made, every=every))
    console.note(f"packed into {out} in {duration(time.perf_counter() - start_s)}")


@commands.command()
@_artifact
@_all
@_json
def inspect(artifact: Path, every: bool, as_json: bool) -> None:
    """Show what is in ARTIFACT, per tensor. Every byte is checked."""
    from waterfill import api

    with shown("checking"):
        inspection = api.inspect(artifact)
    if as_json:
        console.print_json(show_plan.inspection_record(inspection))
    else:
        console.out().print(show_plan.inspection_view(inspection, every=every))


@commands.command()
@_artifact
@_json
def seal(artifact: Path, as_json: bool) -> None:
    """Accept the small files of ARTIFACT as they are now: settings, template, tokenizer. Weights are checked."""
    from waterfill import api

    with shown("checking"):
        sealed = api.seal(artifact)
    if as_json:
        console.print_json(sealed.to_dict())
    else:
        console.out().print(show_plan.sealed_view(sealed))


@commands.command(name="eval")
@_model
@click.option("--against", metavar="MODEL", help="The model that it was packed from, or a .kld file of llama.cpp.")
@click.option("--text", "text_file", type=FILE, help="Text to measure on.")
@click.option("--reference", type=FILE, help="What --save-reference wrote of the original, in its place.")
@click.option("--save-reference", type=PATH, metavar="FILE", help="Write what MODEL predicts, to measure others by.")
@click.option(
    "--beside", metavar="MODEL", help="Another model on the same windows, and how much less or more it loses."
)
@click.option(
    "--convention",
    type=click.Choice(["gptq", "strided", "llama.cpp", "decode", "exl3"]),
    help="How the text is cut and scored; gptq (default) scores all of every window.",
)
@click.option("--context", type=int, metavar="N", help="Tokens per window (2048, llama.cpp 512, or the model's limit).")
@click.option("--stride", type=int, metavar="N", help="Tokens between windows, of strided and exl3 (512).")
@click.option(
    "--windows", "max_windows", type=click.IntRange(min=1), metavar="N", help="Measure on the first windows only."
)
@click.option("--batch", type=int, metavar="N", help="Windows, or questions, per forward pass (1).")
@click.option("--memory", metavar="SIZE", help="Stay below this, e.g. 1GB: stream an artifact that does not fit.")
@memory_form
@rate_option
@click.option(
    "--tasks",
    metavar="NAMES",
    multiple=True,
    help="Tasks of lm-eval, presets (knowledge, alignment, efficiency), files of JSON lines; with commas.",
)
@click.option("--shots", type=click.IntRange(min=0), metavar="N", help="Examples before each question.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask the first questions of each task only.")
@click.option("--chat-template", is_flag=True, help="Put questions into the model's chat template.")
@click.option("--efficiency", is_flag=True, help="Measure memory and speed, in processes of their own.")
@click.option("--prompt-tokens", type=int, metavar="N", help="Tokens to read, with --efficiency (256).")
@click.option("--new-tokens", type=int, metavar="N", help="Tokens to write, with --efficiency (128).")
@click.option("--statistics", is_flag=True, help="Show the three tables of llama-perplexity --kl-divergence as well.")
@click.option("--no-cache", is_flag=True, help="Keep nothing on disk: neither the original's predictions nor scores.")
@_revision
@_json
def evaluate(
    model: str, text_file: Path | None, statistics: bool, no_cache: bool, as_json: bool, **options: Any
) -> None:
    """Measure MODEL: an artifact, a Hugging Face directory or hub id, or a GGUF file.

    With --text perplexity, and with --against as well KL divergence and top-1 agreement, beside the prediction. With
    --tasks scores in benchmarks, with --efficiency memory and speed.
    """
    from waterfill import api

    with shown() as progress:
        result = api.evaluate(model, text=text_file, cache=not no_cache, progress=progress, **console.given(options))
    if as_json:
        console.print_json(show_evaluation.record(result))
    else:
        console.out().print(show_evaluation.view(result, statistics=statistics))


commands.add_command(prune.prune)
commands.add_command(study.compare)
commands.add_command(study.report)
commands.add_command(tune.tune)


commands.add_command(run.generate)
commands.add_command(run.chat)


@commands.command()
@_json
def doctor(as_json: bool) -> None:
    """Show what computes here, and check that it is right."""
    from waterfill.studies.diagnosis.doctor import diagnose

    logging.getLogger("waterfill").setLevel(logging.ERROR)  # a diagnosis says all of that itself
    diagnosis = diagnose()
    if as_json:
        console.print_json(asdict(diagnosis))
    else:
        console.out().print(show_doctor.view(diagnosis))
    sys.exit(0 if diagnosis.healthy else 1)


class _Log(logging.Handler):
    """Waterfill's own messages, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(record.levelname.lower(), record.getMessage())


def main() -> None:
    """Entry point: errors become one sentence, or one JSON object, and exit code 2; faults of ours are tracebacks."""
    console.show_everything()
    log = logging.getLogger("waterfill")
    log.handlers = [_Log()]
    log.setLevel(logging.INFO)
    try:
        with interrupts.kept(), events.python_warnings() if events.wanted() else nullcontext():
            commands.main(prog_name="waterfill", standalone_mode=False)
    except WaterfillError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(f"{error.format_message().rstrip('.')}; {_help_hint(error)}")
    except OSError as error:
        _fail(f"cannot use {error.filename}: {error.strerror}" if error.filename else first_line(error))
    except MemoryError:
        _fail("there is not enough memory; free some, or ask for less at a time")
    except (KeyboardInterrupt, click.Abort):
        if events.wanted():
            _print_error("interrupted")
        else:
            console.note("interrupted")
        sys.exit(130)
    except Exception as error:
        if events.wanted():
            _print_error(f"a fault of waterfill: {type(error).__name__}, {first_line(error)}; please report it")
        raise


def _help_hint(error: click.ClickException) -> str:
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "waterfill"
    return f"try {path} --help"


def _fail(sentence: str) -> None:
    _print_error(sentence)
    sys.exit(2)


def _print_error(sentence: str) -> None:
    if events.wanted():
        events.write("error", message=sentence)
        try:
            console.print_json({"error": sentence})
        except OSError:  # standard output cannot be written, which may be the error itself
            sys.stdout = io.StringIO()
        return
    click.echo(click.style("error: ", fg="red", bold=True) + sentence, err=True)
