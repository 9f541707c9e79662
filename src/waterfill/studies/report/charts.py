"""The charts of a report: each takes facts and returns inline SVG. What a mark says is what its tooltip shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from waterfill.planning.budget import format_size
from waterfill.studies.report.bound import ideal_bits, mse_distortion
from waterfill.studies.report.facts import Report
from waterfill.studies.report.places import Unit
from waterfill.studies.report.svg import Plot, Scale, mark, number, outline, superscript, tag

TALL_ROWS = 40  # more rows than this are drawn thinner
DWARFS, MAX_LINES = 3, 10  # times the largest layer, that a bar may have in one line; lines that it may have
FAMILIES = 8  # libraries that have a colour of their own


def about(unit: Unit) -> str:
    """What a mark of a matrix says."""
    rows, columns = unit.tensors[0].shape
    count = f"{len(unit.tensors)} × " if len(unit.tensors) > 1 else ""
    lines = [
        unit.name,
        f"{count}{rows} × {columns}, {unit.codec}",
        f"{unit.bits:.3f} bits per weight, {format_size(unit.size_bytes)}",
        f"costs {number(unit.kl, 2)} nats per token",
    ]
    return "\n".join(lines)


def rows_of(units: Sequence[Unit]) -> dict[str, list[Unit]]:
    """Units by layer; those outside the layers have a row each, in execution order."""
    rows: dict[str, list[Unit]] = {}
    for unit in units:
        rows.setdefault(unit.place.layer or unit.place.label, []).append(unit)
    return rows


def bytes_by_layer(report: Report, units: Sequence[Unit]) -> Markup:
    """A bar per layer, cut into its matrices; widths are bytes. A bar that dwarfs the layers takes several lines."""
    kept = sum(tensor.size_bytes for tensor in report.plan.kept)
    headers = report.size_bytes - kept - sum(unit.size_bytes for unit in units)
    rows = [
        (label, [(unit.size_bytes, about(unit), unit.place.colour) for unit in row])
        for label, row in rows_of(units).items()
    ]
    others = (
        ("kept as it is", kept, f"{len(report.plan.kept)} tensors that are no matrices, or kept on request"),
        ("headers", headers, "names, shapes and checksums of the weight files"),
    )
    for label, size_bytes, tooltip in others:
        rows.append((label, [(size_bytes, f"{label}\n{format_size(size_bytes)}\n{tooltip}", "f0s2")]))
    totals = [sum(size for size, *_ in blocks) for _, blocks in rows]
    most = _line_bytes(totals, [bool(row[0].place.layer) for row in rows_of(units).values()])
    pitch = 26 if len(rows) <= TALL_ROWS else 15
    lines = [max(1, math.ceil(total / most - 1e-9)) for total in totals]
    plot = Plot("Bytes by layer and matrix", pitch * sum(lines), Scale(0, most), Scale(0, 1), 88, 66, 2, 2)
    top = 0
    for (label, blocks), total, count in zip(rows, totals, lines, strict=True):
        plot.add(_row_label(label, top, pitch))
        start = 0
        for size_bytes, tooltip, colour in blocks:
            plot.add(mark(_block(plot, start, size_bytes, most, top, pitch), tooltip, f"block {colour}"))
            start += size_bytes
        top += pitch * count
        plot.add(_row_value(format_size(total), total / most - (count - 1), top - pitch, pitch))
    return plot.svg("bars")


def _line_bytes(totals: Sequence[int], layers: Sequence[bool]) -> float:
    """Bytes of a whole line: the longest bar's, or twice the largest layer's where all of them would be too short."""
    inside = [total for total, layer in zip(totals, layers, strict=False) if layer]
    longest = max(*totals, 1)
    if not inside or longest <= DWARFS * max(inside):
        return longest
    return max(2 * max(inside), longest / MAX_LINES)


def _block(plot: Plot, start: int, size_bytes: int, most: float, top: float, pitch: int) -> Markup:
    """A run of bytes of a bar, on every line that it touches."""
    parts = []
    line, end = int(start // most), start + size_bytes
    while True:
        first, last = max(start, line * most), min(end, (line + 1) * most)
        width = max((last - first) / most, 0.0015)
        x, y = plot.px(first - line * most), top + line * pitch + 2
        parts.append(tag("rect", x=x, y=y, width=f"{100 * width:.3f}%", height=pitch - 5, rx=2))
        line += 1
        if line * most >= end:
            return tag("g", parts)


def _row_label(label: str, top: float, pitch: int) -> Markup:
    return tag("text", label, x=-8, y=top + pitch / 2, dy="0.28em", class_="label row", text_anchor="end")


def _row_value(text: str, share: float, top: float, pitch: int) -> Markup:
    return tag("text", text, x=f"{100 * share:.3f}%", dx=6, y=top + pitch / 2, dy="0.28em", class_="label value")


def bits_map(units: Sequence[Unit]) -> Markup:
    """Layers by kinds of matrices; a cell is as strong as its bits are many."""
    inside = [unit for unit in units if unit.place.layer]
    if not inside:
        return Markup("")
    kinds = list(dict.fromkeys(unit.place.kind for unit in inside))
    layers = list(dict.fromkeys(unit.place.layer for unit in inside))
    cells: dict[tuple[str, str], list[Unit]] = {}
    for unit in inside:
        cells.setdefault((unit.place.layer, unit.place.kind), []).append(unit)
    shown = {key: 8 * sum(u.size_bytes for u in some) / sum(u.weights for u in some) for key, some in cells.items()}
    low, high = min(shown.values()), max(shown.values())
    pitch = 28 if len(layers) <= TALL_ROWS else 15
    plot = Plot(
        "Bits per weight by layer and kind of matrix",
        pitch * len(layers),
        Scale(0, len(kinds)),
        Scale(0, 1),
        58,
        4,
        26,
        2,
    )
    for column, kind in enumerate(kinds):
        label = kind.rpartition(".")[2].removesuffix("_proj")
        plot.add(tag("text", label, x=plot.px(column + 0.5), y=-9, class_="label", text_anchor="middle"))
    for line, layer in enumerate(layers):
        plot.add(_row_label(layer, line * pitch, pitch))
        for column, kind in enumerate(kinds):
            some = cells.get((layer, kind))
            if not some:
                continue
            bits = shown[layer, kind]
            share = (bits - low) / (high - low) if high > low else 0.5
            step = min(6, int(7 * share))
            shape = [
                tag(
                    "rect",
                    x=plot.px(column),
                    y=line * pitch + 1,
                    width=f"{100 / len(kinds) - 0.5:.3f}%",
                    height=pitch - 3,
                    rx=3,
                )
            ]
            if pitch > 20:
                at = plot.px(column + 0.5 - 0.0025 * len(kinds))
                shape.append(
                    tag("text", f"{bits:.2f}", x=at, y=line * pitch + pitch / 2, dy="0.3em", text_anchor="middle")
                )
            tooltip = (
                about(some[0])
                if len(some) == 1
                else f"{layer}, {kind}\n{len(some)} matrices\n{bits:.3f} bits per weight"
            )
            plot.add(mark(tag("g", shape), tooltip, f"cell h{step}"))
    return plot.svg("map")


def water_level(units: Sequence[Unit]) -> Markup:
    """Bits over sensitivity per weight, and the line on which theory wants them: one bit more per factor of four."""
    shown = [unit for unit in units if unit.alpha > 0 and not unit.exact]
    if not shown:
        return Markup("")
    per_weight = [unit.alpha / unit.weights for unit in shown]
    x = Scale(min(per_weight) / 1.6, max(per_weight) * 1.6, logarithmic=True)
    bits = [unit.bits for unit in shown]
    y = Scale(max(0, math.floor(min(bits) - 0.5)), math.ceil(max(bits) + 0.5))
    plot = Plot("Bits per weight against sensitivity per weight", 280, x, y)
    plot.y_axis("bits per weight")
    plot.x_axis("sensitivity per weight, nats per token", _power, _decades(x))
    total = sum(unit.weights for unit in shown)
    level = sum(u.weights * (u.bits - 0.5 * math.log2(a)) for u, a in zip(shown, per_weight, strict=True)) / total
    ends = [(a, level + 0.5 * math.log2(a)) for a in (x.low, x.high)]
    plot.curve(_clipped(ends, y, x), "theory")
    for unit, a in zip(shown, per_weight, strict=True):
        plot.dot(
            a, unit.bits, f"{about(unit)}\nsensitivity {number(unit.alpha)} nats per unit of noise", unit.place.colour
        )
    return plot.svg()


def _decades(scale: Scale) -> list[float]:
    low, high = math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9)
    if high - low < 1:
        return scale.ticks(3)
    every = math.ceil((high - low + 1) / 6)
    return [10.0**k for k in range(low, high + 1, every)]


def _power(value: float) -> str:
    """10⁻⁵ and the like."""
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    power = f"10{superscript(exponent)}"
    return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:.2g}·{power}"


def _clipped(ends: list[tuple[float, float]], y: Scale, x: Scale) -> list[tuple[float, float]]:
    """A straight line over a logarithmic x, cut off at the frame."""
    (x0, y0), (x1, y1) = ends
    points = []
    for step in range(101):
        value = y0 + (y1 - y0) * step / 100
        if y.low <= value <= y.high:
            points.append((x0 * (x1 / x0) ** (step / 100), value))
    return points


def promise(report: Report) -> Markup:
    """The promised loss as an interval, and what was measured."""
    predicted, measured = report.plan.predicted, report.divergence
    high = predicted.kl_high or predicted.kl * 1.5
    right = max(high, measured.kl + 2 * measured.kl_stderr if measured else 0) * 1.12
    lines = 2 if measured else 1
    plot = Plot("Promised and measured loss", 52 * lines, Scale(0, right), Scale(0, 1), 78, 14, 0, 40)
    plot.x_axis("KL divergence, nats per token")
    plot.add(_row_label("promised", 0, 52))
    interval = (
        f"{number(predicted.kl_low)} to {number(high)}" if predicted.kl_high else "no upper bound: beyond the range"
    )
    width = f"{100 * (plot.x(high) - plot.x(predicted.kl_low)):.3f}%"
    bar = tag("rect", x=plot.px(predicted.kl_low), width=width, y=16, height=20, rx=10, class_="interval")
    tick = tag("line", x1=plot.px(predicted.kl), x2=plot.px(predicted.kl), y1=12, y2=40, class_="stroke")
    plot.add(mark(tag("g", [bar, tick]), f"promised before packing\nKL {number(predicted.kl)}\n{interval}", "promised"))
    if measured:
        plot.add(_row_label("measured", 52, 52))
        low, up = max(0.0, measured.kl - 2 * measured.kl_stderr), measured.kl + 2 * measured.kl_stderr
        error = tag("line", x1=plot.px(low), x2=plot.px(up), y1=78, y2=78, class_="stroke")
        dot = tag("circle", cx=plot.px(measured.kl), cy=78, r=7)
        tooltip = f"measured on {measured.tokens:,} tokens\nKL {number(measured.kl)} ± {number(measured.kl_stderr, 2)}"
        plot.add(mark(tag("g", [error, dot]), tooltip, "measured"))
    return plot.svg()


def noise_check(units: Sequence[Unit]) -> Markup:
    """Noise as packed over noise as promised, matrix by matrix."""
    shown = [unit for unit in units if not unit.exact and unit.t2 > 0 and unit.t2_measured > 0]
    if not shown:
        return Markup("")
    ratios = [100 * (unit.t2_measured / unit.t2 - 1) for unit in shown]
    reach = max(5.0, *(1.15 * abs(ratio) for ratio in ratios))
    plot = Plot("Noise as packed against noise as promised", 170, Scale(-0.5, len(shown) - 0.5), Scale(-reach, reach))
    plot.y_axis("noise as packed against promised, %", lambda v: ("+" if v > 0 else "") + number(v))
    plot.x_axis("matrices in execution order", str, [])
    plot.add(tag("line", x1="0%", x2="100%", y1=plot.py(0), y2=plot.py(0), class_="base"))
    for place, (unit, ratio) in enumerate(zip(shown, ratios, strict=True)):
        tooltip = (
            f"{unit.name}\nt² promised {number(unit.t2)}\nt² as packed {number(unit.t2_measured)} ({ratio:+.2f} %)"
        )
        plot.dot(place, ratio, tooltip, unit.place.colour, 4.5)
    return plot.svg()


def pareto(report: Report) -> Markup:
    """Loss over size: the promise with its interval, this artifact, other methods, and what theory forbids."""
    curve = report.curve
    if len(curve) < 2:
        return Markup("")
    peers = [row for row in report.peers if row.kl and row.size_bytes]
    rows = [*report.ours, *peers]
    losses = [p.kl for p in curve] + [row.kl or 0 for row in rows] + [p.kl for p in report.bound if p.kl > 0]
    sizes = [p.size_bytes for p in curve] + [row.size_bytes or 0 for row in rows] + [report.size_bytes]
    floor = max(min(losses), min(p.kl for p in curve) / 4)
    x = Scale(min(sizes) / 1.04, max(sizes) * 1.04, logarithmic=True)
    y = Scale(floor / 1.3, min(max(losses) * 1.3, 20.0), logarithmic=True)
    plot = Plot("Loss against size", 340, x, y)
    plot.y_axis("KL divergence, nats per token", number, y.ticks(5))
    plot.x_axis("size of the weight files", format_size)
    plot.curve([(p.size_bytes, p.kl) for p in report.bound if p.kl >= y.low], "bound")
    inside = [p for p in curve if p.kl_high]
    plot.band([(p.size_bytes, max(p.kl_low, y.low), p.kl_high or p.kl) for p in inside], "band")
    beyond = [p for p in curve if not p.kl_high] + inside[:1]
    plot.curve([(p.size_bytes, p.kl) for p in beyond], "ours beyond")
    plot.curve([(p.size_bytes, p.kl) for p in inside], "ours")
    for p in curve:
        interval = f"{number(p.kl_low)} to {number(p.kl_high)}" if p.kl_high else "beyond the range of promises"
        plot.dot(
            p.size_bytes,
            p.kl,
            f"plan of {p.bits:.2f} bits per weight\n{format_size(p.size_bytes)}\nKL {number(p.kl)} ({interval})",
            "plan",
            3,
        )
    families = list(dict.fromkeys(row.family for row in peers))
    for row in peers:
        assert row.kl is not None
        loss = f"KL {number(row.kl)} ± {number(row.kl_stderr or 0, 2)}"
        tooltip = f"{row.title}\n{format_size(row.size_bytes or 0)}, {row.bits or 0:.2f} bits per weight\n{loss}"
        family = families.index(row.family)
        plot.shape(row.size_bytes or 0, row.kl, tooltip, f"peer p{family % FAMILIES}", family)
    for row in report.ours:
        kl = f"KL {number(row.kl or 0)} ± {number(row.kl_stderr or 0, 2)}, promised {number(row.predicted_kl or 0)}"
        plot.dot(
            row.size_bytes or 0, row.kl or 0, f"plan, measured\n{format_size(row.size_bytes or 0)}\n{kl}", "done", 4.5
        )
    here = report.divergence or report.plan.predicted
    how = "measured" if report.divergence else "promised"
    tooltip = f"this model\n{format_size(report.size_bytes)}\n{how} KL {number(here.kl)}"
    plot.dot(report.size_bytes, here.kl, tooltip, "here", 8)
    return plot.svg()


def pareto_families(report: Report) -> list[tuple[Markup, str]]:
    """(key of the legend, library) of the peers in the chart."""
    families = dict.fromkeys(row.family for row in report.peers if row.kl and row.size_bytes)
    keys = []
    for number_, family in enumerate(families):
        drawing = tag("svg", [outline(number_, 5)], viewBox="-6.5 -6.5 13 13", width=13, height=13, aria_hidden="true")
        keys.append((tag("span", [drawing], class_=f"peer p{number_ % FAMILIES}"), family))
    return keys


def bound_gap(units: Sequence[Unit]) -> Markup:
    """Bits per weight above Shannon's bound at the noise that each matrix has."""
    shown = [unit for unit in units if not unit.exact and 0 < unit.t2_measured < 1]
    if not shown:
        return Markup("")
    gaps = [gap_bits(unit) for unit in shown]
    x = Scale(math.floor(min(u.bits for u in shown) - 0.25), math.ceil(max(u.bits for u in shown) + 0.25))
    plot = Plot("Bits above Shannon's bound", 220, x, Scale(0, max(0.3, 1.15 * max(gaps))))
    plot.y_axis("bits per weight above the bound")
    plot.x_axis("bits per weight as stored")
    for unit, gap in zip(shown, gaps, strict=True):
        ideal = unit.bits - gap
        lines = (
            unit.name,
            f"{unit.codec}, {unit.bits:.3f} bits per weight",
            f"bound at this noise: {ideal:.3f}",
            f"{gap:.3f} bits above it",
        )
        plot.dot(unit.bits, gap, "\n".join(lines), unit.place.colour)
    return plot.svg()


def gap_bits(unit: Unit) -> float:
    """Stored bits per weight beyond what Shannon's bound asks for the noise that was measured."""
    return unit.bits - ideal_bits(min(1.0, mse_distortion(unit.t2_coded, min(unit.rho, 1.0))))
