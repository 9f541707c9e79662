"""In which order a pass multiplies its matrices: the artifact's to begin with, then that of the last pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from waterfill.running.streaming.chunks import StreamedMatrix


class Order:
    """The matrices of a pass, in the order of execution as far as it is known.

    A pass ends when a matrix comes that it has multiplied already.
    """

    def __init__(self, matrices: Iterable[StreamedMatrix]) -> None:
        self._matrices = list(matrices)
        self._seen: dict[StreamedMatrix, None] = {}  # in this pass, in order

    @property
    def matrices(self) -> tuple[StreamedMatrix, ...]:
        return tuple(self._matrices)

    @property
    def amid_pass(self) -> bool:
        """Whether any matrix was noted since the last pass ended."""
        return bool(self._seen)

    def ends_pass(self, matrix: StreamedMatrix) -> bool:
        """Whether this one belongs to the next pass."""
        return matrix in self._seen

    def note(self, matrix: StreamedMatrix) -> None:
        """It is multiplied now."""
        self._seen.setdefault(matrix)

    def learn(self, matters: Callable[[StreamedMatrix], bool]) -> bool:
        """End the pass; True if the matrices whose order `matters` came in another one than is known.

        They come first from then on, and those that were left out behind them.
        """
        came = [matrix for matrix in self._seen if matters(matrix)]
        among = set(came)
        self._seen = {}
        if [matrix for matrix in self._matrices if matrix in among] == came:
            return False
        self._matrices = came + [matrix for matrix in self._matrices if matrix not in among]
        return True

    def forget_pass(self) -> None:
        """The next matrix is the first of a pass."""
        self._seen = {}
