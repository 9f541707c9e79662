"""Several texts at once: a pass of the model reads on in all of them, and the weights are read once for all.

prompts, waiting ──join──► runs ──drafts──► one pass over their sequences ──tokens──► (number, piece)
                             ▲                                              │
                             └──────────────── those that have not ended ◄──┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

from waterfill.base.arguments import check, whole
from waterfill.base.errors import MemoryLimitError
from waterfill.files.settings.messages import Message
from waterfill.running.text.defaults import Defaults
from waterfill.running.text.generation import Asked, Clock, Run
from waterfill.running.text.model import Sequences, TokenModel, read
from waterfill.running.text.sampling import GenerationStats, Sampling
from waterfill.running.text.tokenizer import TextStream, Tokenizer

TOGETHER = 8  # texts of a pass: what the kernels for few tokens take at once


class Generations(Iterator[tuple[int, str]]):
    """Pieces of several texts, as they come: (number of the prompt, piece). Nothing runs but while one is asked for.

    for number, piece in engine.generate_many(prompts): ...
    texts = engine.generate_many(prompts).texts()
    """

    def __init__(self, pieces: Generator[tuple[int, str], None, None], clock: Clock, count: int) -> None:
        self._pieces, self._clock = pieces, clock
        self._texts: list[list[str]] = [[] for _ in range(count)]

    def __next__(self) -> tuple[int, str]:
        number, piece = next(self._pieces)
        self._texts[number].append(piece)
        return number, piece

    def texts(self) -> list[str]:
        """All texts, in the order of their prompts, once they are generated."""
        for _ in self:
            pass
        return ["".join(pieces) for pieces in self._texts]

    def close(self) -> None:
        """End all texts: there are no more pieces."""
        self._pieces.close()

    @property
    def stats(self) -> GenerationStats:
        """Counts and times of all texts up to now."""
        return self._clock.stats()


def generate_many(
    model: TokenModel | Sequences,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling | None = None,
    *,
    defaults: Defaults | None = None,
    lookup: int | None = None,
    together: int = TOGETHER,
    **overrides: Any,
) -> Generations:
    """Continue several texts, or answer several conversations, `together` of them at a time.

    Each text is what `generate` makes of its prompt with the same arguments. One that has ended leaves, and the next
    prompt takes its place; where memory is limited, as soon as there is room for it.

    Raises what `generate` does, for any of the prompts.
    """
    check("together", together, whole(1))
    asked = Asked(model, tokenizer, sampling, defaults, lookup=lookup, **overrides)
    waiting = deque(enumerate([asked.ids(prompt) for prompt in prompts]))
    clock, runs = Clock(), list[_Text]()
    if waiting:
        runs.append(_join(asked, tokenizer, waiting))  # what cannot be said is refused before anything is asked for
    return Generations(_pieces(asked, tokenizer, waiting, runs, clock, together), clock, len(prompts))


class _Text(NamedTuple):
    number: int
    run: Run
    stream: TextStream


Waiting = deque[tuple[int, list[int]]]


def _join(asked: Asked, tokenizer: Tokenizer, waiting: Waiting) -> _Text:
    """The next prompt's text begins. Raises MemoryLimitError, with the prompt still waiting, where it does not fit."""
    number, ids = waiting[0]
    run = asked.run(ids)
    waiting.popleft()
    return _Text(number, run, TextStream(tokenizer))


def _pieces(
    asked: Asked, tokenizer: Tokenizer, waiting: Waiting, texts: list[_Text], clock: Clock, together: int
) -> Generator[tuple[int, str], None, None]:
    clock.start()
    try:
        while texts or waiting:
            _fill(asked, tokenizer, waiting, texts, together)
            for text, tokens in zip(list(texts), _pass([text.run for text in texts]), strict=True):
                clock.count(len(tokens))
                piece = "".join(map(text.stream.add, tokens))
                if text.run.ended:
                    piece += text.stream.end()
                    text.run.close()
                    texts.remove(text)
                if piece:
                    yield text.number, piece
    finally:
        for text in texts:
            text.run.close()


def _fill(asked: Asked, tokenizer: Tokenizer, waiting: Waiting, texts: list[_Text], together: int) -> None:
    """Have prompts join that there is room for."""
    while waiting and len(texts) < together:
        try:
            texts.append(_join(asked, tokenizer, waiting))
        except MemoryLimitError:
            if not texts:
                raise
            return


def _pass(runs: Sequence[Run]) -> list[list[int]]:
    """The next tokens of each text."""
    drafts = [run.propose() for run in runs]
    ids = [[*run.ids, *draft.ids] for run, draft in zip(runs, drafts, strict=True)]
    logits = read([run.sequence for run in runs], ids, [len(draft.ids) + 1 for draft in drafts])
    return [run.take(draft, rows) for run, draft, rows in zip(runs, drafts, logits, strict=True)]
