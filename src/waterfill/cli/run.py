"""The commands that run a model: `generate` and `chat`. `cli` has the others, and puts these among them."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from waterfill.base.errors import WaterfillError
from waterfill.cli import console
from waterfill.cli.commands import PATH, SectionedCommand, combined, memory_form, rate_option
from waterfill.cli.progress import shown
from waterfill.cli.show.generation import generation_line, generation_record

if TYPE_CHECKING:
    from waterfill.running.runner import Pieces
    from waterfill.running.streaming.streamer import Streamer

_artifact = click.argument("artifact", type=PATH)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_sampling_options = combined(
    click.option("--max-new-tokens", type=int, metavar="N", help="Tokens to generate at most."),
    click.option(
        "--temperature", type=float, metavar="X", help="0 is greedy; as the model's own settings say when not given."
    ),
    click.option(
        "--top-p",
        type=float,
        metavar="X",
        help="Sample among the likeliest tokens that hold this probability; 1 is all.",
    ),
    click.option("--top-k", type=int, metavar="N", help="Sample among this many likeliest tokens; 0 is all."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Divides the score of tokens seen before; 1 is none."
    ),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same text."),
)
_running_options = combined(
    click.option("--memory", metavar="SIZE", help="Stay below this, e.g. 1GB: stream a model that does not fit."),
    memory_form,
    rate_option,
    click.option("--draft", type=PATH, help="Let this smaller artifact draft tokens."),
    click.option(
        "--draft-rate", type=float, metavar="BITS", help="Let ARTIFACT itself draft, read at this rate (--rates)."
    ),
    click.option(
        "--lookup", type=click.IntRange(min=1), metavar="N", help="Draft up to N tokens from what the text said before."
    ),
    click.option(
        "--engine",
        type=click.Choice(("auto", "native", "transformers")),
        help="Who runs the model; auto is native where that can be.",
    ),
    click.option(
        "--kv",
        metavar="BITS",
        help="Keys and values of the text by codes of 8, 5, 4 or 3 bits, or of each, as 5,4; 16 (default) is as they "
        "are. By the native engine.",
    ),
    click.option("--adapter", type=PATH, help="Run with this adapter, as `tune` or PEFT saves it; by transformers."),
)

LIVE_S = 0.5  # between two lines about the stream


@click.command(cls=SectionedCommand)
@_artifact
@click.option("--prompt", "-p", required=True, help="Text to continue.")
@_sampling_options
@_running_options
@_json
def generate(artifact: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue a prompt, streaming the text."""
    running = _Running(artifact, options)
    stream = running.generate(prompt)
    if as_json:
        text = running.text(stream)
        console.print_json({"prompt": prompt, "text": text, **running.record(stream)})
    else:
        running.show(stream, after=prompt)


@click.command(cls=SectionedCommand)
@_artifact
@click.option("--system", help="System message.")
@_sampling_options
@_running_options
@_json
def chat(artifact: Path, system: str | None, as_json: bool, **options: Any) -> None:
    """Talk to ARTIFACT. An empty line or Ctrl-D ends the conversation, Ctrl-C an answer."""
    running = _Running(artifact, {"max_new_tokens": 512, **console.given(options)})
    messages = [{"role": "system", "content": system}] if system else []
    while said := _ask():
        messages.append({"role": "user", "content": said})
        stream = running.generate(messages)
        answer: list[str] = []
        if as_json:
            answer.append(running.text(stream))
        else:
            with contextlib.suppress(KeyboardInterrupt):
                running.show(stream, answer)
        messages.append({"role": "assistant", "content": "".join(answer)})
    if as_json:
        console.print_json({"messages": messages})


class _Running:
    """A loaded model and how to sample from it."""

    def __init__(self, artifact: Path, options: dict[str, Any]) -> None:
        from waterfill.running.runner import open_runner
        from waterfill.running.text.sampling import Sampling

        chosen = console.given(options)
        names = ("memory", "memory_form", "draft", "lookup", "engine", "kv", "rate", "draft_rate", "adapter")
        running = {name: chosen.pop(name) for name in names if name in chosen}
        self._sampling = Sampling(**chosen)
        with shown("loading the model"):
            self._runner = open_runner(artifact, **running)

    @property
    def streaming(self) -> Streamer | None:
        return self._runner.streaming

    def generate(self, prompt: Any) -> Pieces:
        if self.streaming is not None:
            self.streaming.reset()
        return self._runner.generate(prompt, self._sampling)

    def record(self, stream: Pieces) -> dict[str, Any]:
        """What a generation took, and what was streamed for it."""
        record = generation_record(stream.stats)
        if self.streaming is not None:
            record["streaming"] = self.streaming.summary().to_dict()
        return record

    def text(self, stream: Pieces) -> str:
        """All of a text; how far it is is shown meanwhile."""
        pieces = []
        with shown("reading the prompt") as step:
            for piece in stream:
                pieces.append(piece)
                step("generating", stream.stats.tokens, self._sampling.max_new_tokens)
        return "".join(pieces)

    def show(self, stream: Pieces, pieces: list[str] | None = None, *, after: str = "") -> None:
        """Print a text as it comes, `after` the one that it continues; `pieces` collects it."""
        live = _Live(after)
        with contextlib.closing(stream):
            try:
                for number, piece in enumerate(stream):
                    live.clear()
                    if after and number == 0:  # not earlier: what is logged until then would run into it
                        click.echo(click.style(after, dim=True), nl=False)
                    click.echo(piece, nl=False)
                    if pieces is not None:
                        pieces.append(piece)
                    if self.streaming is not None:
                        live.show(piece, self.streaming.summary().short)
            finally:
                live.clear()
                click.echo()
        console.note(generation_line(stream.stats))
        if self.streaming is not None:
            console.note(self.streaming.summary().line)


class _Live:
    """A remark behind the text, on terminals, where the line has room for it; it is gone before more text comes."""

    def __init__(self, text: str) -> None:
        self._terminal = sys.stdout.isatty()
        self._column, self._shown, self._last_s = 0, False, 0.0
        self._advance(text)

    def _advance(self, text: str) -> None:
        before, newline, rest = text.rpartition("\n")
        self._column = len(rest) + (0 if newline else self._column + len(before))

    def show(self, piece: str, remark: str) -> None:
        self._advance(piece)
        if not self._terminal or time.monotonic() - self._last_s < LIVE_S:
            return
        width = shutil.get_terminal_size().columns
        column = self._column % width
        if column + len(remark) + 3 < width:
            click.echo("\x1b7  " + click.style(remark, dim=True) + "\x1b8", nl=False)
            self._shown, self._last_s = True, time.monotonic()

    def clear(self) -> None:
        if self._shown:
            click.echo("\x1b[K", nl=False)
            self._shown = False


def _ask() -> str:
    """The user's next line; empty at the end of the conversation."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise WaterfillError(f"standard input is not UTF-8 text ({error}); write it in UTF-8") from error
