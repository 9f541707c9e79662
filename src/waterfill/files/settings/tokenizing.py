"""What a tokenizer.json of a stranger may do to a text: bounds on how much longer it makes it, and failures in words.

Normalisers, post-processors and decoders replace pieces of a text with others, and chains of them multiply. How much
they can make of one character is found from their settings, before any text goes in. Patterns are bounded by their
library: Oniguruma gives up on a match after ten million steps, about .2 s; by failing, which `in_words` catches.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from waterfill.base.errors import WaterfillError, first_line

MOST_GROWTH = (
    1024  # characters that one of a text may become; with the tokenizers of known models it is some 40 at most
)
_UNICODE = {"BertNormalizer": 3, "ByteLevel": 4, "Lowercase": 3, "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}


def check_growth(backend: Any) -> None:
    """Refuse a tokenizer of the library `tokenizers` that may make more than MOST_GROWTH characters, or tokens, of one.

    Raises:
        WaterfillError: it may; says by which of its parts.
    """
    for name in ("normalizer", "post_processor", "decoder"):
        part = getattr(backend, name)
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MOST_GROWTH:
            raise WaterfillError(
                f"the {name} of the model's tokenizer may make a text {growth:.3g} times as long: expected "
                f"{MOST_GROWTH} times at most; give the tokenizer.json that came with the model"
            )


def _growth(part: Any) -> float:
    """Characters that a part makes of one, at most, from its settings; also more than the truth, never less."""
    kind = part.get("type")
    if kind == "Sequence":
        growth = 1.0
        for inner in next(value for name, value in part.items() if name != "type"):
            growth *= _growth(inner)
        return growth
    if kind == "Replace":
        pattern, content = part["pattern"], len(part["content"])
        # A pattern may match nothing, between any two characters.
        return max(1.0, content / len(pattern["String"])) if pattern.get("String") else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(part["prepend"])
    if kind == "Precompiled":
        return _longest(base64.b64decode(part["precompiled_charsmap"] or ""))
    if kind == "TemplateProcessing":
        tokens = {name: len(token["ids"]) for name, token in part["special_tokens"].items()}
        return float(sum(tokens.get(piece["SpecialToken"]["id"], 1) if "SpecialToken" in piece else 1
                         for piece in part["single"]))  # fmt: skip
    return float(_UNICODE.get(kind, 1))


def _longest(charsmap: bytes) -> float:
    """Of the replacements in SentencePiece's map, which end with a zero each, behind a table and its length."""
    table = 4 + int.from_bytes(charsmap[:4], "little")
    return float(max(1, *map(len, charsmap[table:].split(b"\0"))))


@contextmanager
def in_words() -> Iterator[None]:
    """Failures of the library `tokenizers` as WaterfillError, those of its Rust code included."""
    try:
        yield
    except BaseException as error:
        if (failure := failed(error)) is not None:
            raise failure from error
        raise


def failed(error: BaseException) -> WaterfillError | None:
    """The error in words if it came from Rust, whose panics are no `Exception`s, and of a class without a module."""
    if type(error).__name__ != "PanicException":
        return None
    return WaterfillError(f"the model's tokenizer fails on the text ({first_line(error)}); check its tokenizer.json")
