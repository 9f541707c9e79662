"""Click as the command line uses it: help by section, commands in the order of use, transformers kept quiet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from waterfill.base.lazy import after_import
from waterfill.cli import events

_SECTIONS = {
    "On a text": ("text_file", "against", "convention", "context", "stride", "max_windows", "statistics", "no_cache"),
    "Tasks": ("tasks", "shots", "limit", "chat_template"),
    "Efficiency": ("efficiency", "prompt_tokens", "new_tokens"),
    "Our plans": ("sizes", "bits_per_weight"),
    "Methods": ("methods", "no_match"),
    "Budget (exactly one; --speed also beside bytes)": ("size", "bits", "rates", "max_kl", "lossless", "speed"),
    "Target (exactly one)": ("keep_share", "out_size"),
    "Parts": ("what", "importance", "multiple", "kv_heads", "refit"),
    "Choices": ("gain", "keep", "tie", "uniform", "purpose", "disk", "codecs"),
    "Sensitivities": (
        *("probe", "text", "calibration", "precision", "quick", "sequences", "length", "seed", "method"),
        "sensitivity",
    ),
    "Error feedback": ("feedback", "calibrate", "calibration_tokens"),
    "Text": ("prompt", "prompts", "system", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"),
    "Running": ("memory", "memory_form", "rate", "draft", "draft_rate", "lookup", "engine", "kv", "adapter"),
}

Decorator = Callable[[Any], Any]


class _Path(click.Path):
    """Not empty: `Path("")` would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; name a file or directory", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)
FILE = _Path(exists=True, dir_okay=False, path_type=Path)


class SectionedCommand(click.Command):
    """Lists the options of its help by section."""

    def invoke(self, ctx: click.Context) -> Any:
        after_import("transformers", _quiet_transformers)  # which most commands do, but not all
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if events.wanted():  # click would write an empty line between the events
                raise click.Abort from error
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        section_of = {name: section for section, names in _SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {section: [] for section in (*_SECTIONS, "Options")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[section_of.get(parameter.name or "", "Options")].append(record)
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


class OrderedGroup(click.Group):
    """Lists its commands in the order of their use."""

    command_class = SectionedCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def combined(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order of the help."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_STORAGE_OR_MEMORY = (
    "storage (default): entropy-coded, least loss for its bytes, decoded to a byte per weight when loaded; "
    "memory: fixed rate, runs from its codes"
)
purpose_option = click.option(
    "--for", "purpose", type=click.Choice(["storage", "memory"]), help=f"{_STORAGE_OR_MEMORY}."
)
plan_purpose_option = click.option(
    "--for",
    "purpose",
    type=click.Choice(["storage", "memory", "stream"]),
    help=f"{_STORAGE_OR_MEMORY}; stream: either, for weights that are read from storage for every token (--disk).",
)
memory_form = click.option(
    "--memory-form",
    type=click.Choice(["auto", "codes", "levels"]),
    help="levels: decoded once, the quickest; codes: about as small as the file, decoded for every token; "
    "auto (default): levels where they fit, else codes, else streamed from storage.",
)
rate_option = click.option(
    "--rate",
    type=float,
    metavar="BITS",
    help="Read no more than so many bits per weight, of an artifact that was packed at several rates (--rates).",
)


def _quiet_transformers() -> None:
    """Its errors come as exceptions; its bars and warnings speak of other things than the user's command."""
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not events.wanted():
        enable_progress_bars()  # the line above silences downloads too
