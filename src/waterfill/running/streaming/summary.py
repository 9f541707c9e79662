"""What a streamed model has read and computed, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from waterfill.base.records import Record

WAITING = 0.3  # of the time: storage limits


@dataclass(frozen=True)
class Summary(Record):
    """Over `passes` passes through the weights. Times of decoding and multiplying are all threads' by their number."""

    form: str  # codes: all of them are in memory; else storage
    passes: int
    elapsed_s: float
    bytes_read: int
    waiting_s: float  # of the computation, for storage
    decode_s: float
    multiply_s: float
    kept_bytes: int
    cached_bytes: int
    limiting: str = field(init=False)  # storage, decode, multiply, or other: the model's own code

    def __post_init__(self) -> None:
        busy = {"decode": self.decode_s, "multiply": self.multiply_s}
        busy["other"] = self.elapsed_s - self.waiting_s - sum(busy.values())
        slowest = max(busy, key=lambda name: busy[name])
        storage = self.waiting_s > WAITING * self.elapsed_s
        object.__setattr__(self, "limiting", "storage" if storage else slowest)

    @property
    def short(self) -> str:
        """A few words, while it runs."""
        elapsed = max(self.elapsed_s, 1e-9)
        source = "codes in memory" if self.form == "codes" else f"{self.bytes_read / elapsed / 1e9:.2f} GB/s"
        return f"{self.passes / elapsed:.1f} passes/s · {source} · {self.limiting}"

    @property
    def line(self) -> str:
        """One line for people."""
        elapsed = max(self.elapsed_s, 1e-9)
        codes = f"{self.kept_bytes / 1e6:.0f} MB of codes in memory"
        source = codes if self.form == "codes" else f"{self.bytes_read / elapsed / 1e9:.2f} GB/s read"
        return (
            f"{self.passes / elapsed:.2f} passes/s, {source}, limited by "
            f"{self.limiting} ({100 * self.waiting_s / elapsed:.0f} % waiting, {100 * self.decode_s / elapsed:.0f} % "
            f"decoding, {100 * self.multiply_s / elapsed:.0f} % multiplying)"
        )
