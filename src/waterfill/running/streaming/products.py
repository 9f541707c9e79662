"""Products with chunks that arrive one after another: the library begins with each as soon as it is there.

source ──take──► tasks ──► all threads of the library ──► y
   ▲                │
   └───give_back────┘  when a task is finished, while others are being worked on
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from waterfill.base import native
from waterfill.running.streaming.chunks import Chunk, ChunkData, expect
from waterfill.running.streaming.storage import Slot
from waterfill.running.streaming.view import Activations, View

Held = tuple[ChunkData, Slot | None]  # with the slot of the ring that the bytes lie in, if any
Take = Callable[[Chunk, bool], Held | None]  # a chunk; None: it is not there yet, and was not to be waited for


class Product(NamedTuple):
    """One chunk's columns of y."""

    chunk: Chunk
    x: Activations
    y: View


class Products:
    """Several products that are computed together; the y of all have one dtype.

    Args:
        take: asked for one chunk after another, in their order.
        give_back: given each slot when its bytes are not needed any more.
    """

    notices_interrupts = True  # in `_ready`, by the status that the library gives then

    def __init__(self, products: Sequence[Product], take: Take, give_back: Callable[[Slot], object]) -> None:
        self._products, self._take, self._give_back = products, take, give_back
        self._prepared = [product.x.prepared(product.chunk.matrix.codec) for product in products]
        self._tasks = (native.Task * len(products))()
        self._held: deque[Held] = deque()
        self._taken = self._finished = 0
        self._failure: BaseException | None = None

    def run(self, nanoseconds: npt.NDArray[np.int64]) -> None:
        """Compute them; time spent by all threads is added to `nanoseconds`, `[2]`: decoding, multiplying.

        Raises what `take` raised, and ArtifactError for a part that is damaged or has changed.
        """
        first = self._products[0]
        try:
            if first.x.isa is None:
                self._one_by_one(nanoseconds)
            else:
                self._together(first.x.isa, first.y.dtype, nanoseconds)
        finally:
            self._finish(self._taken)

    def _one_by_one(self, nanoseconds: npt.NDArray[np.int64]) -> None:
        for product in self._products:
            self._next(product.chunk, wait=True)
            self._held[0][0].multiply(product.x, product.y, nanoseconds)
            self._finish(self._taken)

    def _together(self, isa: str, dtype: int, nanoseconds: npt.NDArray[np.int64]) -> None:
        library = native.library()
        assert library is not None
        status, flaw = library.multiply_chunks(
            library.isas[isa], self._tasks, dtype=dtype, ready=native.READY(self._ready), nanoseconds=nanoseconds
        )
        if self._failure is not None:
            raise self._failure
        if status == native.ENDED:  # by an exception that came just as `_ready` was called
            raise KeyboardInterrupt
        expect(status, flaw, [product.chunk for product in self._products])

    def _ready(self, _: int | None, finished: int, wait: int, count: Any) -> None:
        """wf_ready. An exception cannot pass through the library: it is kept, and raised behind it."""
        try:
            self._finish(finished)
            while self._taken < len(self._products):
                number = self._taken
                if not self._next(self._products[number].chunk, wait=bool(wait)):
                    break
                self._tasks[number] = self._held[-1][0].task(self._prepared[number], self._products[number].y)
                wait = False
            count[0] = self._taken
        except BaseException as error:
            self._failure = error

    def _next(self, chunk: Chunk, *, wait: bool) -> bool:
        """Take the next product's chunk; False if it is not there.

        One that the library does not decode is decoded here, and no other beside it: it is larger than the memory that
        is reckoned with.
        """
        if not wait and chunk.matrix.native is None:
            return False
        held = self._take(chunk, wait)
        if held is None:
            return False
        data, slot = held
        self._held.append((data.ready(), slot))
        self._taken += 1
        return True

    def _finish(self, finished: int) -> None:
        """Give back what the first `finished` tasks held."""
        for _ in range(finished - self._finished):
            _, slot = self._held.popleft()
            self._finished += 1
            if slot is not None:
                self._give_back(slot)
