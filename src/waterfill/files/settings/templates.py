"""Chat templates: a conversation as the text that a model was trained to read.

transformers' own names and blocks, in a sandbox with bounds. Both runners render here: what is rendered is what
`apply_chat_template` makes, as far as templates stay within the bounds, and no file of a model is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from waterfill.base.errors import WaterfillError, first_line
from waterfill.files.settings.messages import Message, refused
from waterfill.files.settings.sandbox import CHARACTERS, MOST_SOURCE, BoundedEnvironment, StepBudget

WORK, WORK_EACH = 2_000_000, 256  # steps of a template, and more for each few characters of a conversation
MOST_TEXT, MOST_TIMES = 1 << 20, 16  # characters of any text it makes, and more for each of a conversation
_NEEDLE = "qzneedleqz"  # a word that no template has, or changes beyond the case of its letters


def conversation_text(template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation up to where the assistant's next answer begins.

    Some templates want the content of a message as text, some as a list of parts, and leave out the other without a
    word: so it is given in the first form that they show. `special_tokens` are variables of the template, as
    "bos_token".

    Raises:
        WaterfillError: the template is no Jinja, fails, does more than it may, refuses the conversation, or leaves out
            what the user says in either form.
    """
    program = _Program(template, special_tokens, len(str(messages)))
    if not all(isinstance(message["content"], str) for message in messages):
        return program.text(messages)
    asked = [{**message, "content": _NEEDLE} if message["role"] == "user" else message for message in messages]
    failure = WaterfillError("the model's chat template leaves out what the user says; change it")
    for form in (list, _in_parts):
        try:
            if asked == messages or _NEEDLE in program.text(form(asked)).casefold():
                return program.text(form(messages))
        except WaterfillError as error:
            failure = error if form is list else failure
    raise failure


def check_template(template: str) -> None:
    """Refuse a template that nothing can be rendered with.

    Raises:
        WaterfillError: it is no Jinja, or too long.
    """
    _Program(template, {}, 0)


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


class _Program:
    """A template, with one budget for all conversations of about as many characters that it is tried with."""

    def __init__(self, template: str, special_tokens: Mapping[str, str], characters: int) -> None:
        self._variables = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}
        budget = StepBudget(
            work=WORK + WORK_EACH * characters // CHARACTERS, most_text=MOST_TEXT + MOST_TIMES * characters
        )
        with _in_words():
            if len(template) > MOST_SOURCE:
                raise TemplateError(f"it has more than {MOST_SOURCE} characters")
            self._template = _environment(budget).from_string(template)

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        # Templates print a null as "None", and handle what is missing.
        conversation = [{name: value for name, value in message.items() if value is not None} for message in messages]
        with _in_words():
            return self._template.render(messages=conversation, **self._variables)


@contextmanager
def _in_words() -> Iterator[None]:
    """A stranger's program may fail in any way, also in Jinja's parser and Python's compiler."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise WaterfillError(f"the model's chat template is no Jinja ({first_line(error)}); change it") from error
    except TemplateError as error:
        raise refused(error) from error
    except Exception as error:
        raise WaterfillError(f"the model's chat template fails ({first_line(error)}); change it") from error


def _environment(budget: StepBudget) -> BoundedEnvironment:
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return BoundedEnvironment(
        budget, functions, trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


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
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # not what it holds, which may hold itself
        return "<Namespace>"


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
