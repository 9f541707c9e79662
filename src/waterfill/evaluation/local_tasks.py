"""Tasks in JSON lines, which need no network. One kind per file, told by the fields of its records:

    {"question": "…", "choices": ["…", "…"], "answer": 0}     multiple choice: acc, acc_norm (by length in bytes)
    {"prompt": "…", "answer": "…"}                            generation: exact_match; "until": ["…"] ends an answer,
                                                              by default a new line
    {"text": "…"}                                             a document: word_perplexity, byte_perplexity,
                                                              bits_per_byte, as lm-eval's `wikitext` has them

Choices follow the question after a space, unless one of the two brings its own white space.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waterfill.base import reading
from waterfill.base.errors import WaterfillError

SUFFIX = ".jsonl"
ANSWER_TOKENS = 64  # that are generated at most

Document = Mapping[str, Any]
_KINDS: dict[str, Mapping[str, type]] = {
    "multiple choice": {"question": str, "choices": list, "answer": int},
    "generation": {"prompt": str, "answer": str},
    "document": {"text": str},
}


def read_task(path: Path) -> dict[str, Any]:
    """A file as a task configuration of lm-eval.

    Raises:
        WaterfillError: it is no such file; names the line.
    """
    documents = _documents(path)
    kind = _kind(path, documents)
    common = {"task": path.stem, "custom_dataset": _dataset(documents), "test_split": "test", "num_fewshot": 0}
    common["metadata"] = {"version": 1.0}
    if kind == "document":
        return {**common, **_PERPLEXITY}
    return {**common, **(_CHOICE if kind == "multiple choice" else _generation(documents))}


def _documents(path: Path) -> list[Document]:
    try:
        lines = reading.read_text(path, sys.maxsize).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WaterfillError(f"{path} cannot be read as UTF-8 text ({error}); name a file of JSON lines") from error
    documents = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                documents.append(json.loads(line))
            except ValueError as error:
                raise WaterfillError(
                    f"line {number} of {path} is no JSON ({error}); write one object per line"
                ) from error
    if not documents:
        raise WaterfillError(f"{path} is empty; write one JSON object per line")
    return documents


def _kind(path: Path, documents: Sequence[Document]) -> str:
    """The kind of the first record, which all others have to be of."""
    kinds = [kind for kind in _KINDS if _is(kind, documents[0])]
    if not kinds:
        raise WaterfillError(
            f"the first record of {path} is of no known kind; give 'question', 'choices' and 'answer' (a number), or "
            "'prompt' and 'answer', or 'text'"
        )
    for number, document in enumerate(documents, 1):
        if not _is(kinds[0], document):
            wanted = ", ".join(_KINDS[kinds[0]])
            raise WaterfillError(f"record {number} of {path} is no {kinds[0]} like the first; give {wanted}")
        if kinds[0] == "multiple choice" and not _answerable(document):
            raise WaterfillError(
                f"record {number} of {path} answers {document['answer']} of {len(document['choices'])} choices; "
                "give two texts or more, and count from 0"
            )
        if kinds[0] == "generation" and document.get("until") != documents[0].get("until"):
            raise WaterfillError(f"record {number} of {path} ends otherwise than the first; give the same 'until'")
    return kinds[0]


def _is(kind: str, document: Any) -> bool:
    fields = _KINDS[kind]
    return isinstance(document, dict) and all(type(document.get(name)) is fields[name] for name in fields)


def _answerable(document: Document) -> bool:
    choices = document["choices"]
    return (
        len(choices) >= 2 and all(isinstance(c, str) and c for c in choices) and 0 <= document["answer"] < len(choices)
    )


def _dataset(documents: Sequence[Document]) -> Any:
    def build(**_: Any) -> Any:
        import datasets

        return {"test": datasets.Dataset.from_list([dict(document) for document in documents])}

    return build


def _means(*metrics: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics]


def _asked(document: Document) -> str:
    """A question with the space that goes before its choices."""
    question: str = document["question"]
    spaced = question[-1:].isspace() or any(choice[:1].isspace() for choice in document["choices"])
    return question if spaced or not question else f"{question} "


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": _asked,
    "doc_to_choice": lambda document: document["choices"],
    "doc_to_target": lambda document: document["answer"],
    "target_delimiter": "",
    "metric_list": _means("acc", "acc_norm"),
}
_PERPLEXITY = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": lambda document: document["text"],
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


def _generation(documents: Sequence[Document]) -> dict[str, Any]:
    until = documents[0].get("until", ["\n"])
    if not isinstance(until, list) or not all(isinstance(end, str) and end for end in until):
        raise WaterfillError(f"'until' is {until!r}; give a list of texts that end an answer")
    strip = {"function": "remove_whitespace"}
    return {
        "output_type": "generate_until",
        "doc_to_text": lambda document: document["prompt"],
        "doc_to_target": lambda document: document["answer"].strip(),
        "target_delimiter": "",
        "generation_kwargs": {"until": until, "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
        "filter_list": [{"name": "stripped", "filter": [strip, {"function": "take_first"}]}],
        "metric_list": _means("exact_match"),
    }
