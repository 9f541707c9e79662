"""What probes were made of, and what each of their sequences said, on disk: nothing is sampled or measured twice.

    cache folder / probes / FINGERPRINT / text-KEY / 0003.json        a sequence of the model's own text
                                        / passes-KEY / 0003.json      alpha, beta of every matrix on it
                                        / trials-KEY / 0003.json      what it lost with noise in all matrices
                                        / left-KEY / 0000.json        what error feedback leaves of every matrix's loss

Each file is written whole, as soon as it is known: a run that was broken off goes on behind the last of them. One that
cannot be read is made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import torch

from waterfill.base import typed
from waterfill.base.cache import cache_folder
from waterfill.base.errors import WaterfillError, first_line
from waterfill.base.reading import read_text
from waterfill.base.typed import Magnitude, Range, Share
from waterfill.base.writing import write_file
from waterfill.codecs.feedback import Left
from waterfill.files.architecture import Matrix
from waterfill.planning.estimators import ProbePass
from waterfill.planning.trials import Loss

_log = logging.getLogger(__name__)

VERSION = 4  # of what is kept: another way to sample or to measure is another one


@dataclass(frozen=True)
class _Sequence:
    tokens: tuple[Annotated[int, Range(0, 2**31)], ...]


@dataclass(frozen=True)
class _Losses:
    kl: tuple[Loss, ...]


@dataclass(frozen=True)
class _Share:
    loss: Share
    noise: Magnitude
    alpha: Magnitude | None
    early: tuple[Magnitude, Magnitude] | None = None


@dataclass(frozen=True)
class _Shares:
    left: Mapping[str, _Share]


@dataclass(frozen=True)
class ProbeStore:
    """Of one model's weights; with no `folder` it forgets everything."""

    folder: Path | None

    @classmethod
    def of(cls, fingerprint: str, *, kept: bool = True) -> ProbeStore:
        """In the user's cache folder."""
        return cls(cache_folder() / "probes" / fingerprint if kept else None)

    def text(self, *key: object) -> Shelf:
        """Own text sampled in one way."""
        return self._shelf("text", key)

    def passes(self, matrices: Iterable[Matrix], *key: object) -> Shelf:
        """Passes that measured these matrices in one way."""
        names = [matrix.name for matrix in matrices]
        return replace(self._shelf("passes", (*key, *names)), names=frozenset(names))

    def trials(self, *key: object) -> Shelf:
        """What sequences lost with some noise."""
        return self._shelf("trials", key)

    def shares(self, matrices: Iterable[Matrix], *key: object) -> Shelf:
        """What error feedback by some moments leaves of the losses of these matrices."""
        return self._shelf("left", (*key, *(matrix.name for matrix in matrices)))

    def _shelf(self, kind: str, key: Sequence[object]) -> Shelf:
        digest = blake2b(repr((VERSION, *key)).encode(), digest_size=8).hexdigest()
        return Shelf(None if self.folder is None else self.folder / f"{kind}-{digest}")


FORGETFUL = ProbeStore(None)


@dataclass(frozen=True)
class Shelf:
    """Numbered things of one kind."""

    folder: Path | None
    names: frozenset[str] = frozenset()  # of the matrices that passes measure

    def sequence(self, number: int) -> torch.Tensor | None:
        """Token ids `[length]`, int64; None where they are not there."""
        stored = self._load(_Sequence, number)
        return None if stored is None else torch.tensor(stored.tokens, dtype=torch.int64)

    def keep_sequence(self, number: int, tokens: torch.Tensor) -> None:
        """Write token ids `[length]`."""
        self._write(number, {"tokens": tokens.tolist()})

    def probe_pass(self, number: int) -> ProbePass | None:
        """What a sequence said; None where that is not there."""
        stored: ProbePass | None = self._load(ProbePass, number)
        whole = stored is not None and stored.alpha.keys() == stored.beta.keys() == stored.tokens.keys() == self.names
        return stored if whole else None

    def keep_pass(self, number: int, measured: ProbePass) -> None:
        """Write what a sequence said."""
        self._write(number, asdict(measured))

    def losses(self, number: int) -> tuple[float, ...] | None:
        """What some sequences lost; None where that is not there."""
        stored: _Losses | None = self._load(_Losses, number)
        return None if stored is None else stored.kl

    def keep_losses(self, number: int, losses: Sequence[float]) -> None:
        """Write what some sequences lost."""
        self._write(number, {"kl": losses})

    def left(self) -> dict[str, Left] | None:
        """What error feedback leaves, by matrix; None where that is not there."""
        stored: _Shares | None = self._load(_Shares, 0)
        return None if stored is None else {name: Left(**vars(share)) for name, share in stored.left.items()}

    def keep_left(self, left: Mapping[str, Left]) -> None:
        """Write what error feedback leaves."""
        self._write(0, {"left": {name: share._asdict() for name, share in left.items()}})

    def _load(self, kind: Any, number: int) -> Any:
        if self.folder is None:
            return None
        try:
            return typed.read(kind, json.loads(read_text(self._file(number))))
        except (OSError, ValueError, RecursionError):
            return None

    def _write(self, number: int, content: Any) -> None:
        if self.folder is None:
            return
        try:
            write_file(self._file(number), json.dumps(content))
        except WaterfillError as error:
            _log.warning("what a probe said cannot be kept in %s (%s)", self.folder, first_line(error))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:04d}.json"
