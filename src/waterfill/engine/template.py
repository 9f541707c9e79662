"""Chat templates: Jinja programs of strangers, rendered in a sandbox with the names that transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from waterfill.errors import WaterfillError
from waterfill.sampling import Message, refused


def render(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant's next answer begins.

    `special_tokens` are variables of the template, as "bos_token". Raises WaterfillError if the template is no Jinja
    or refuses the conversation.
    """
    # Templates print a null as "None", and handle what is missing.
    conversation = [{name: value for name, value in said.items() if value is not None} for said in messages]
    try:
        return (
            _environment()
            .from_string(template)
            .render(messages=conversation, tools=None, documents=None, add_generation_prompt=True, **special_tokens)
        )
    except TemplateError as error:
        raise refused(error) from error


def check_template(template: str) -> None:
    """Raise WaterfillError if a template is no Jinja."""
    try:
        _environment().parse(template)
    except TemplateError as error:
        raise WaterfillError(f"the chat template is no Jinja ({error}); mend it") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter would escape what means something in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class _Dict:
    """Makes dictionaries, and has no more of the type `dict` than that."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's own, without names that lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # as Jinja has it: a template may say namespace(self=...)
        found = dict(*rest, **kwargs)
        for name in found:
            _check(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name}")


class _GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant said, for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
