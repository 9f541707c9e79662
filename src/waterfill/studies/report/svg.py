"""Inline SVG that keeps its text readable at any width.

A plot is as wide as the page: horizontal places are per cent of it, vertical ones pixels, and text is never scaled.
Curves, which per cent cannot express, lie in a nested drawing of 1000 units that is stretched without its strokes.
Every piece of text and every attribute is escaped here, so that no name from a model becomes markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

UNITS = 1000  # horizontal units of a nested drawing


def tag(name: str, content: str | Markup | Iterable[Markup] = "", **attributes: object) -> Markup:
    """An element; `_` in attribute names stands for `-`, a trailing one is dropped (`class_`), None is left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = escape(content) if isinstance(content, str) else Markup("").join(content)
    return Markup(f"<{name}{given}>{inner}</{name}>")


@dataclass(frozen=True)
class Scale:
    """Values to the unit interval, linearly or by their logarithms."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            span = math.log(self.high / self.low)
            return math.log(max(value, 1e-300) / self.low) / span if span else 0.5
        return (value - self.low) / (self.high - self.low) if self.high != self.low else 0.5

    def ticks(self, count: int = 5, apart: float = 0.0) -> list[float]:
        """Round values within the scale, about `count` of them, and no two closer than `apart`."""
        ticks = (_log_ticks if self.logarithmic else _linear_ticks)(self.low, self.high, count)
        kept = ticks[:1]
        for value in ticks[1:]:
            if self(value) - self(kept[-1]) >= apart:
                kept.append(value)
        return kept


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    if high <= low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(1 + i / 10 for i in range(90))):
        ticks = [m * 10.0**d for d in decades for m in steps if low * 0.9999 <= m * 10.0**d <= high * 1.0001]
        if len(ticks) >= min(count, 3):
            every = math.ceil(len(ticks) / (2 * count))
            return ticks[::every]
    return [low, high]


def number(value: float, digits: int = 3) -> str:
    """A figure as people write it: significant digits, no exponent within reach, a true minus."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:.{max(0, digits - 1 - exponent)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}·10{superscript(exponent)}"
    return text.replace("-", "−")


def superscript(exponent: int) -> str:
    """⁻⁵ and the like."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# Outlines within one unit of the origin, which tell libraries apart without their colours.
SHAPES = (
    "M-.85-.85H.85V.85H-.85Z",
    "M0-1.2L1.2 0L0 1.2L-1.2 0Z",
    "M0-1.15L1.1 .8H-1.1Z",
    "M0 1.15L1.1-.8H-1.1Z",
    "M-.38-1.1H.38V-.38H1.1V.38H.38V1.1H-.38V.38H-1.1V-.38H-.38Z",
    "M-1.15 0L.8-1.1V1.1Z",
    "M1.15 0L-.8-1.1V1.1Z",
    "M0-1.1L1.05-.34L.65 .9H-.65L-1.05-.34Z",
)


def outline(number_: int, radius: float) -> Markup:
    """One of `SHAPES` around the origin."""
    path = tag("path", d=SHAPES[number_ % len(SHAPES)], vector_effect="non-scaling-stroke", class_="shape")
    return tag("g", [path], transform=f"scale({radius:g})")


@dataclass
class Plot:
    """One chart: marks are collected from the back to the front, then drawn with `svg`."""

    title: str  # its accessible name
    height: int
    x: Scale
    y: Scale
    left: int = 52
    right: int = 14
    top: int = 30
    bottom: int = 40
    _parts: list[Markup] = field(default_factory=list)

    def px(self, value: float) -> str:
        """Horizontal place of a value, in per cent."""
        return f"{100 * self.x(value):.3f}%"

    def py(self, value: float) -> str:
        """Vertical place of a value, in pixels from the top."""
        return f"{self.height * (1 - self.y(value)):.2f}"

    def add(self, *parts: Markup) -> None:
        self._parts.extend(parts)

    def x_axis(self, label: str, write: Callable[[float], str] = number, ticks: Sequence[float] | None = None) -> None:
        for value in self.x.ticks(5, 0.14) if ticks is None else ticks:
            at = self.px(value)
            self.add(
                tag("line", x1=at, x2=at, y1=self.height, y2=self.height + 4, class_="tick"),
                tag("text", write(value), x=at, y=self.height + 17, class_="label", text_anchor="middle"),
            )
        self.add(tag("text", label, x="100%", y=self.height + 34, class_="axis", text_anchor="end"))
        self.add(tag("line", x1="0%", x2="100%", y1=self.height, y2=self.height, class_="base"))

    def y_axis(self, label: str, write: Callable[[float], str] = number, ticks: Sequence[float] | None = None) -> None:
        for value in self.y.ticks(5) if ticks is None else ticks:
            at = self.py(value)
            self.add(
                tag("line", x1="0%", x2="100%", y1=at, y2=at, class_="grid"),
                tag("text", write(value), x=-8, y=at, dy="0.32em", class_="label", text_anchor="end"),
            )
        self.add(tag("text", label, x=-self.left, y=-self.top + 13, class_="axis"))

    def curve(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """A line through points (x, y)."""
        if len(points) > 1:
            path = "M" + "L".join(self._place(*point) for point in points)
            self.add(self._stretched(tag("path", d=path, class_=class_, vector_effect="non-scaling-stroke")))

    def band(self, points: Sequence[tuple[float, float, float]], class_: str) -> None:
        """The area between two lines, through points (x, low, high)."""
        if len(points) > 1:
            there = [self._place(x, high) for x, _, high in points]
            back = [self._place(x, low) for x, low, _ in reversed(points)]
            self.add(self._stretched(tag("path", d="M" + "L".join(there + back) + "Z", class_=class_)))

    def dot(self, x: float, y: float, tooltip: str, class_: str, radius: float = 5.5) -> None:
        """A mark that can be pointed at and focused; `tooltip` is what it tells, one fact per line."""
        self.add(mark(tag("circle", cx=self.px(x), cy=self.py(y), r=radius), tooltip, class_))

    def shape(self, x: float, y: float, tooltip: str, class_: str, number_: int, radius: float = 5) -> None:
        """A mark like `dot`, with an outline of its own."""
        place = tag("svg", [outline(number_, radius)], x=self.px(x), y=self.py(y), class_="inner")
        self.add(mark(place, tooltip, class_))

    def svg(self, class_: str = "") -> Markup:
        """The drawing, inside the element that gives it its margins and scrolls if need be."""
        drawing = tag(
            "svg",
            self._parts,
            width="100%",
            height=self.height,
            class_="plot",
            role="group",
            aria_label=f"{self.title}. Arrow keys move between the marks.",
        )
        style = f"padding:{self.top}px {self.right}px {self.bottom}px {self.left}px"
        return tag("div", [drawing], class_=f"frame {class_}".strip(), style=style)

    def _place(self, x: float, y: float) -> str:
        return f"{UNITS * self.x(x):.2f} {self.height * (1 - self.y(y)):.2f}"

    def _stretched(self, content: Markup) -> Markup:
        box = f"0 0 {UNITS} {self.height}"
        return tag(
            "svg", [content], viewBox=box, preserveAspectRatio="none", width="100%", height=self.height, class_="inner"
        )


def mark(shape: Markup, tooltip: str, class_: str) -> Markup:
    """A shape as a focusable mark; `tooltip` is shown in the tooltip and read out."""
    spoken = tooltip.replace("\n", ", ")
    return tag(
        "g", [shape], class_=f"mark {class_}".strip(), tabindex="-1", role="img", aria_label=spoken, data_tip=tooltip
    )
