"""Text to token ids and back, as transformers' fast tokenizers do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from waterfill.base.errors import WaterfillError
from waterfill.files.settings.messages import Message, check_messages, check_text, plain_lines
from waterfill.files.settings.tokenizing import in_words
from waterfill.running.text.sampling import begun

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are no character, or not yet


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its chat template; `tokenizer_files.load_tokenizer` makes one from a directory."""

    backend: Backend
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # by name, as {"bos_token": "<s>"}
    templates: Mapping[str, str] = field(default_factory=dict)  # chat templates by name; without a choice "default"

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a text to continue or of a conversation to answer, one at least.

        Raises:
            WaterfillError: text that is not UTF-8, malformed messages, a template that refuses them, and an empty
                prompt if no token begins a text.
        """
        with in_words():
            if isinstance(prompt, str):
                check_text(prompt)
                ids = _ids(self.backend.encode(prompt))
            else:
                ids = self._conversation_ids(prompt)
        beginning = self.special_tokens.get("bos_token")
        return begun(ids, None if beginning is None else self.backend.token_to_id(beginning))

    def _conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        check_messages(messages)
        if not self.templates:
            return _ids(self.backend.encode(plain_lines(messages)))
        if "default" not in self.templates:
            raise WaterfillError(
                f"the model's chat templates are {', '.join(sorted(self.templates))} and none is the default; "
                'call one of them "default" or give the prompt as text'
            )
        from waterfill.files.settings.templates import conversation_text

        text = conversation_text(self.templates["default"], messages, self.special_tokens)
        return _ids(self.backend.encode(text, add_special_tokens=False))  # the template writes them itself

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens."""
        with in_words():
            text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text


def _ids(encoding: Encoding) -> list[int]:
    ids: list[int] = encoding.ids
    return ids


class TextStream:
    """The text of ids that come one by one. What `add` and `end` return is together what `decode` says of all ids.

    (Of ids that are no UTF-8 it may have less: a decoder can take back a character for the bytes that follow it.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders look back: at the bytes before, or whether a text begins. So new ids are decoded behind the ones
        # that were said last, and the text of those is cut off.
        self._said: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that is certain with one more id; empty while a character is not complete."""
        self._waiting.append(token)
        text = self._text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._said, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """The text of ids that have waited for more."""
        text = self._text()
        self._said, self._waiting = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._said)
        return self._tokenizer.decode(self._said + self._waiting)[len(before) :]
