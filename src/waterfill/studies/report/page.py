"""From facts to one self-contained page: nothing in it is fetched, and nothing in it runs but a tooltip."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from waterfill.planning.budget import format_size
from waterfill.planning.plan import Plan
from waterfill.studies.report import charts
from waterfill.studies.report.facts import Report, planned_with
from waterfill.studies.report.places import units
from waterfill.studies.report.svg import number

_PROBES = {"self": "text that the model wrote itself", "random": "random tokens", "text": "a text"}


def render(report: Report) -> str:
    """The page as HTML."""
    marks = units(report.plan.tensors, dict(report.measured_t2))
    environment = Environment(
        loader=PackageLoader("waterfill.studies.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": format_size,
        "number": number,
        "percent": _percent,
        "elements": math.prod,
        "breakable": _breakable,
    }
    folder = resources.files("waterfill.studies.report") / "template"
    plan = report.plan
    payload = sum(tensor.size_bytes for tensor in plan.tensors)
    rows = charts.rows_of(marks)
    context: dict[str, Any] = {
        "report": report,
        "plan": plan,
        "predicted": plan.predicted,
        "measured": report.divergence,
        "units": marks,
        "rows": [(label, row, sum(unit.size_bytes for unit in row)) for label, row in rows.items()],
        "weights": sum(tensor.weights for tensor in plan.tensors),
        "payload": payload,
        "excess": payload / report.ideal_bytes - 1 if report.ideal_bytes else 0.0,
        "gap_bits": 8 * (payload - report.ideal_bytes) / sum(tensor.weights for tensor in plan.tensors),
        "gaps": {unit.name: charts.gap_bits(unit) for unit in marks if not unit.exact and 0 < unit.t2_measured < 1},
        "probe": str(plan.probe.get("text") or _PROBES.get(str(plan.probe.get("kind")), "an unknown probe")),
        "calibrated": _calibrated(plan),
        "inside": _inside(report),
        "options": planned_with(plan),
        "legend": list(dict.fromkeys((unit.place.colour, unit.place.kind) for unit in marks)),
        "families": charts.pareto_families(report),
        "rise": lambda kl: 100 * math.expm1(kl),
        "charts": {
            "bytes": charts.bytes_by_layer(report, marks),
            "map": charts.bits_map(marks),
            "level": charts.water_level(marks),
            "promise": charts.promise(report),
            "noise": charts.noise_check(marks),
            "pareto": charts.pareto(report),
            "gap": charts.bound_gap(marks),
        },
        "style": Markup((folder / "style.css").read_text("utf-8")),
        "script": Markup((folder / "script.js").read_text("utf-8")),
    }
    return environment.get_template("page.html").render(context)


def _calibrated(plan: Plan) -> str | None:
    """What error feedback was made of; None where there is none."""
    if (on := plan.calibration) is None:
        return None
    return f"{on.token_count:,} tokens of {on.text or _PROBES['self']}"


def _inside(report: Report) -> bool | None:
    """Whether the promise was kept, within two standard errors; None where there is nothing to say."""
    predicted, measured = report.plan.predicted, report.divergence
    if measured is None or predicted.kl_high is None:
        return None
    return predicted.kl_low - 2 * measured.kl_stderr <= measured.kl <= predicted.kl_high + 2 * measured.kl_stderr


def _breakable(name: str) -> Markup:
    """A name that a narrow column may break at its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"
