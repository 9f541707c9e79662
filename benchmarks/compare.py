"""Our plans beside every peer at true bytes, and the linearity theorem against the KL of packed models.

The comparison: `waterfill compare` on the example model at 2.5 to 8 bits, with every method that its registry knows.
Our plans are data-free: planned from text that the model samples itself. Beside every peer stands our plan within the
peer's bytes. Calibrated peers (GPTQ, GGUF with an importance matrix) see text of the kind that is measured on; our
plans do not.

The theorem: variants of the packed model (uniform and allotted, several families of codecs, many budgets), each packed,
decoded and measured; predicted from sensitivities on other text of the same kind.

Results are kept in the user's cache directory, so that a second run is quick; `--fresh` keeps none. Draws
docs/images/compare.png and docs/images/theorem.png where matplotlib is installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared.models import OpenedModel, open_model, split_windows, spread
from benchmarks.shared.report import EXAMPLE_MODEL, REPOSITORY, BenchmarkReport, held_out_text, parse_arguments
from waterfill.base.errors import WaterfillError
from waterfill.codecs import get_codec
from waterfill.planning.budget import Budget
from waterfill.planning.menu import CODECS
from waterfill.planning.planner import Request
from waterfill.planning.probe import Probe, probe_tokens
from waterfill.planning.sensitivity import Sensitivity, measure
from waterfill.studies.comparison import (
    DEFAULT_BITS,
    PLAIN,
    UNIFORM,
    Comparison,
    Method,
    Row,
    StudiedModel,
    compare_methods,
    select,
)
from waterfill.studies.comparison.ours import packed, plan_for

FIGURES = REPOSITORY / "docs" / "images"
CONTEXT = 512
WITHIN = 0.10  # relative deviation of the prediction that the theorem's range is about
HALF = 0.5  # of the best data-free peer's KL, around these bits
NEAR = {3: (2.75, 3.75), 4: (3.75, 4.75)}  # stored bits of the peers that count as 3 and as 4 bits
ALLOTTED_BITS = (1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0)
PART_BITS = (2.5, 3.0, 4.0, 5.0, 6.0)  # of plans from part of the menu
PER_FAMILY = 4  # uniform plans of each family of codecs
FIRST_BITS, LAST_BITS = 2.5, 6.0  # the theorem is asked to hold from here to there


@dataclass(frozen=True)
class CompareSetup:
    """How much is measured."""

    windows: int
    probe_sequences: int
    probe_length: int
    methods: tuple[str, ...]
    bits: tuple[float, ...]
    codecs: tuple[str, ...]  # of our plans; all when empty


FULL = CompareSetup(60, 64, CONTEXT, ("*",), DEFAULT_BITS, ())
QUICK = CompareSetup(
    2, 4, 128, ("rtn-4", "hqq-4", "bnb-nf4", "gguf-q[34]_k"), (3.0, 4.0), ("higgs-p1-*", "higgs-p2-n16")
)


@dataclass(frozen=True)
class Variant:
    """One packed model of the theorem's test."""

    shape: str  # uniform or allotted
    codecs: str  # the family, or the menu
    row: Row

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        assert self.row.predicted_kl is not None
        assert self.row.kl is not None
        return self.row.predicted_kl / self.row.kl


def main() -> None:
    arguments = parse_arguments(
        __doc__,
        figures={"type": Path, "default": FIGURES, "metavar": "FOLDER"},
        windows={"type": int, "metavar": "N", "help": "measure on this many windows instead"},
        fresh={"action": "store_true", "help": "neither use nor keep results of other runs"},
    )
    setup = QUICK if arguments.quick else FULL
    if arguments.windows:
        setup = replace(setup, windows=arguments.windows)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.fresh:
            os.environ["WATERFILL_CACHE"] = folder
        run(setup, None if arguments.quick else arguments.figures, arguments.json)


def run(setup: CompareSetup, figures: Path | None, json: Path | None) -> None:
    report = BenchmarkReport("methods at true bytes, and the theorem under test")
    opened = open_model(EXAMPLE_MODEL)
    held_out, rest = split_windows(opened.tokenizer, held_out_text(report), CONTEXT)
    ids = spread(held_out, setup.windows).flatten()
    rest = spread(rest, setup.probe_sequences)[:, : setup.probe_length]
    report.note(
        f"{len(ids) // CONTEXT} windows of {CONTEXT} tokens; probes of {len(rest)} x {setup.probe_length} tokens"
    )
    found = compare(report, study(opened, self_probe(opened, setup), rest), ids, setup)
    variants = theorem(report, study(opened, text_probe(opened, rest), None), ids, setup)
    if figures is not None and find_spec("matplotlib"):
        draw_comparison(found, figures / "compare.png")
        draw_theorem(variants, figures / "theorem.png")
        report.note("figures: compare.png, theorem.png")
    report.save(json)


def study(opened: OpenedModel, sensitivity: Sensitivity, calibration: Tensor | None) -> StudiedModel:
    return StudiedModel(opened.name, opened.checkpoint, opened.architecture, opened.model, sensitivity, calibration)


def self_probe(opened: OpenedModel, setup: CompareSetup) -> Sensitivity:
    """As `waterfill plan` measures by default: on text from the model itself."""
    probe = Probe(sequences=setup.probe_sequences, length=setup.probe_length)
    return measured_on(opened, probe_tokens(opened.model, None, probe), "self")


def text_probe(opened: OpenedModel, windows: Tensor) -> Sensitivity:
    return measured_on(opened, windows, "text")


def measured_on(opened: OpenedModel, tokens: Tensor, kind: str) -> Sensitivity:
    about = {"kind": kind, "sequences": len(tokens), "length": tokens.shape[1], "seed": 0}
    matrices = opened.architecture.matrices
    return measure(opened.model, matrices, tokens, fingerprint=opened.checkpoint.fingerprint, probe=about)


# ------------------------------------------------------------------------------------------------------ the comparison


def compare(report: BenchmarkReport, subject: StudiedModel, ids: Tensor, setup: CompareSetup) -> Comparison:
    found = compare_methods(
        subject,
        ids,
        text="held-out code",
        context=CONTEXT,
        methods=select(setup.methods),
        ours=(PLAIN, UNIFORM),
        budgets=[Budget(bits=bits) for bits in setup.bits],
        request=Request(codecs=setup.codecs),
    )
    columns = ["method", "library", "calibrated", "bytes", "bits", "KL", "stderr", "top-1", "ppl", "promised"]
    columns += ["our bytes", "our KL", "ratio", "note"]
    rows = [
        [
            *(
                row.title,
                f"{row.family} {row.version or ''}".strip(),
                "yes" if row.calibrated else "no",
                row.size_bytes,
            ),
            *(row.bits, row.kl, row.kl_stderr, row.top1_agreement, row.ppl, row.predicted_kl),
            *(row.ours_size_bytes, row.ours_kl, row.ratio, row.note),
        ]
        for row in found.measured
    ]
    report.table(
        "KL in nats per token; ratio = our KL within the method's bytes, over its own", columns, rows, key="methods"
    )
    absent = [[row.title, row.problem] for row in found.rows if row.problem]
    if absent:
        report.table("not measured", ["method", "why"], absent, key="not_measured")
    criteria(report, found)
    return found


def criteria(report: BenchmarkReport, found: Comparison) -> None:
    peers = [row for row in found.measured if row.family != "waterfill" and row.ratio is not None]
    free = [row for row in peers if not row.calibrated]
    for row in free:
        assert row.ratio is not None
        report.criterion(f"our_kl_over_{row.method.replace('-', '_')}", row.ratio, "< 1", row.ratio < 1)
    for bits, (low, high) in NEAR.items():
        near = [row for row in free if row.bits is not None and low <= row.bits < high]
        best = max(near, key=lambda row: row.ratio or 0.0, default=None)
        if best is not None and best.ratio is not None:
            report.note(f"at {bits} bits the best data-free peer at equal bytes is {best.title}")
            name = f"our_kl_over_best_data_free_at_{bits}_bits"
            report.criterion(name, best.ratio, f"<= {HALF}", best.ratio <= HALF)
    ahead = [row for row in peers if row.calibrated and row.ratio is not None and row.ratio >= 1]
    said = ", ".join(f"{row.title} ({1 / (row.ratio or 1):.2f} of ours)" for row in ahead)
    report.note(f"calibrated peers ahead of ours at equal bytes: {said or 'none'}")


def draw_comparison(found: Comparison, path: Path) -> None:
    from waterfill.studies.comparison.plot import plot

    path.parent.mkdir(parents=True, exist_ok=True)
    plot(found).savefig(path, facecolor="white")


# --------------------------------------------------------------------------------------------------------- the theorem


def theorem(report: BenchmarkReport, subject: StudiedModel, ids: Tensor, setup: CompareSetup) -> list[Variant]:
    """Pack, decode and measure every variant; say in which range of bits predictions hold."""
    cases = list({c[2].options: c for c in [*allotted_cases(subject, setup), *uniform_cases(subject, setup)]}.values())
    found = compare_methods(
        subject,
        ids,
        text="held-out code",
        context=CONTEXT,
        methods=[method for *_, method in cases],
        ours=(),
        budgets=(),
        request=Request(codecs=setup.codecs),
        match=False,
    )
    variants = [
        Variant(shape, codecs, row)
        for (shape, codecs, _), row in zip(cases, found.rows, strict=True)
        if row.kl and row.predicted_kl
    ]
    variants.sort(key=lambda variant: variant.row.bits or 0.0)
    columns = ["plan", "codecs", "bits", "bytes", "predicted", "measured", "stderr", "predicted / measured"]
    rows = [
        [v.shape, v.codecs, v.row.bits, v.row.size_bytes, v.row.predicted_kl, v.row.kl, v.row.kl_stderr, v.ratio]
        for v in variants
    ]
    report.table("the theorem under test: KL in nats per token", columns, rows, key="theorem")
    report.criterion("packed_variants", len(variants), ">= 40", len(variants) >= 40)
    first, last = holds_between(variants)
    low, high = (first or 99.0) <= FIRST_BITS, (last or 0.0) >= LAST_BITS
    report.criterion("within_10_percent_from_bits", first, f"<= {FIRST_BITS}", low)
    report.criterion("within_10_percent_to_bits", last, f">= {LAST_BITS}", high)
    within = sum(abs(v.ratio - 1) <= WITHIN for v in variants) / max(1, len(variants))
    report.results["share_of_variants_within_10_percent"] = within
    return variants


def holds_between(variants: Sequence[Variant]) -> tuple[float | None, float | None]:
    """The range of bits with the most variants of which all are within 10 %."""
    best: list[Variant] = []
    current: list[Variant] = []
    for variant in variants:
        current = [*current, variant] if abs(variant.ratio - 1) <= WITHIN else []
        best = max(best, current, key=len)
    return (best[0].row.bits, best[-1].row.bits) if best else (None, None)


def uniform_cases(subject: StudiedModel, setup: CompareSetup) -> list[tuple[str, str, Method]]:
    """One codec for all matrices: some of every family of the menu, from the fewest bits to the most."""
    cases = []
    for family, names in families(setup.codecs).items():
        count = min(PER_FAMILY, len(names))
        for place in range(count):
            name = names[round(place * (len(names) - 1) / max(1, count - 1))]
            request = Request(uniform=True, codecs=(name,))
            cases.append(("uniform", family, case(subject, Budget(bits=16.0), request, f"uniform {name}")))
    return cases


def allotted_cases(subject: StudiedModel, setup: CompareSetup) -> list[tuple[str, str, Method]]:
    """Plans at many budgets from the whole menu, and from its largest families alone."""
    menus = [("all", setup.codecs, ALLOTTED_BITS if not setup.codecs else setup.bits)]
    if not setup.codecs:
        menus += [(family, tuple(names), PART_BITS) for family, names in families(()).items() if len(names) > 6]
    cases = []
    for menu, codecs, rates in menus:
        for bits in rates:
            title = f"allotted, {menu}, {bits:g} bits"
            try:
                cases.append(("allotted", menu, case(subject, Budget(bits=bits), Request(codecs=codecs), title)))
            except WaterfillError:
                continue  # this menu has no plan at this budget
    return cases


def case(subject: StudiedModel, budget: Budget, request: Request, title: str) -> Method:
    """A plan to pack. Plans that give every matrix the same are one case, whatever they were asked for: what tells them
    apart, `options`, is then the same."""
    plan = plan_for(subject, budget, request)
    chosen = blake2b(" ".join(tensor.codec for tensor in plan.tensors).encode(), digest_size=8).hexdigest()
    method = packed(plan, title=title, name=title.replace(" ", "-").replace(",", ""))
    gains = blake2b(repr([tensor.rho for tensor in plan.tensors]).encode(), digest_size=8).hexdigest()
    return replace(method, options=f"{chosen} {gains}")


def families(wanted: Sequence[str]) -> dict[str, list[str]]:
    """The menu's codecs by family, each from the fewest bits to the most."""
    from fnmatch import fnmatchcase

    shape = (1024, 1024)
    coded = [f"trellis-s{states}-r{rate}.0000" for states in (8, 64) for rate in range(2, 7)]
    menu = [name for name in (*CODECS, *coded) if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)]
    found: dict[str, list[str]] = {}
    for name in sorted(menu, key=lambda name: get_codec(name).menu_point(shape).rate_bits):
        if get_codec(name).menu_point(shape).rate_bits >= 1.45:  # below, nothing that anybody would use
            found.setdefault(name.rpartition("-")[0] or name, []).append(name)
    return found


def draw_theorem(variants: Sequence[Variant], path: Path) -> None:
    """Predicted over measured by bits, and both against each other."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10.4, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [v.row.kl or 1.0 for v in variants]
    ends = [min(losses) / 2, max(losses) * 2]
    left.plot(ends, ends, color="0.6", linewidth=1)
    right.axhspan(1 - WITHIN, 1 + WITHIN, color="#0b5fa5", alpha=0.12, linewidth=0)
    right.axhline(1, color="0.6", linewidth=1)
    groups = list(dict.fromkeys((v.shape, v.codecs) for v in variants))
    colours = ("#0b5fa5", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#6a4fa3", "#8c6d31", "#5c6670")
    names = list(dict.fromkeys(codecs for _, codecs in groups))
    for shape, codecs in groups:
        own = [v for v in variants if (v.shape, v.codecs) == (shape, codecs)]
        style = {"color": colours[names.index(codecs) % len(colours)], "linestyle": "", "markersize": 5}
        style |= {"marker": "o" if shape == "allotted" else "s", "fillstyle": "full" if shape == "allotted" else "none"}
        left.plot([v.row.kl for v in own], [v.row.predicted_kl for v in own], label=f"{shape}, {codecs}", **style)
        errors = [2 * v.ratio * (v.row.kl_stderr or 0.0) / (v.row.kl or 1.0) for v in own]
        right.errorbar([v.row.bits for v in own], [v.ratio for v in own], errors, elinewidth=0.8, **style)
    left.set(xscale="log", yscale="log", xlabel="measured KL, nats per token", ylabel="predicted KL")
    right.set(xlabel="stored bits per weight", ylabel="predicted / measured")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
