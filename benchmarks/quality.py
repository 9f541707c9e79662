"""Quality at equal stored bits: HIGGS against INT3 and INT4 rounded to nearest, NF4 and HQQ, all on groups of 64.

Every method quantises the same matrices (with the embedding, which is also the head) and is charged for all that it has
to store: indices, scales, zeros, tables (`waterfill.compare` has the methods). HIGGS gets the stored bits of the method
it is compared with, never more: once with
one grid for all matrices, once with bits allotted by the sensitivities of a probe that the model samples itself.

    INT        round to nearest, fp16 scale; symmetric, with an integer zero point, or with an fp16 minimum
    NF4        bitsandbytes; fp32 absmax, or 8-bit absmax ("double quantisation")
    HQQ        hqq's own defaults, groups along the input (axis 1) or the output (axis 0); fp16 scale and zero; ten
               3-bit indices take 32 bits

NF4 and HQQ are left out where their packages are not installed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.shared.models import OpenedModel, decoded_copy, measure_sensitivity, open_model, split_windows
from benchmarks.shared.report import EXAMPLE_MODEL, BenchmarkReport, held_out_text, parse_arguments
from waterfill.codecs.grids import available
from waterfill.evaluation import Divergence, divergence
from waterfill.planning.budget import Budget
from waterfill.planning.costs import matrix_view
from waterfill.planning.plan import Plan
from waterfill.planning.planner import Request, make_plan
from waterfill.planning.sensitivity import Sensitivity
from waterfill.studies.comparison import Unavailable
from waterfill.studies.comparison.peers import bnb_4bit, hqq
from waterfill.studies.comparison.rounding import round_to_nearest
from waterfill.studies.comparison.stored import Quantiser

CONTEXT = 512
ALLOTTED_BITS = 3.25
ALLOTTED_GOAL = 0.6  # KL of the allotted model over that of the uniform one
SCALAR_GRIDS = tuple(f"higgs-p1-n{n}" for p, n in available() if p == 1)

PEER_COLUMNS = ["method", "bits", "KL", "stderr", "ppl", "uniform grid", "uniform bits", "uniform KL", "uniform ppl"]
PEER_COLUMNS += ["allotted bits", "allotted KL", "allotted ppl"]


@dataclass(frozen=True)
class QualityBench:
    """What everything is measured on."""

    subject: OpenedModel
    sensitivity: Sensitivity
    ids: Tensor  # int64 [tokens], whole windows

    def plan(self, bits: float, *, uniform: bool, codecs: tuple[str, ...] = ()) -> Plan:
        budget, request = Budget(bits=bits), Request(uniform=uniform, codecs=codecs)
        return make_plan(self.subject.name, self.subject.architecture, self.sensitivity, budget, request)

    def measure(self, plan: Plan) -> Divergence:
        return self.score(decoded_copy(self.subject, plan.tensors))

    def score(self, model: torch.nn.Module) -> Divergence:
        return divergence(self.subject.model, model, self.ids, context=CONTEXT)


def main() -> None:
    arguments = parse_arguments(__doc__)
    windows, sequences = (6, 6) if arguments.quick else (60, 32)
    report = BenchmarkReport("quality at equal stored bits")
    subject = open_model(EXAMPLE_MODEL)
    held_out, _ = split_windows(subject.tokenizer, held_out_text(report), CONTEXT)
    sensitivity = measure_sensitivity(subject, "self", sequences, CONTEXT)
    bench = QualityBench(subject, sensitivity, held_out[:windows].flatten())
    report.note(
        f"{windows} windows of {CONTEXT} tokens; plans from a probe of {sequences} such, sampled from the model"
    )
    compare_peers(report, bench)
    compare_allotment(report, bench)
    report.save(arguments.json)


def compare_peers(report: BenchmarkReport, bench: QualityBench) -> None:
    """Every peer beside the uniform and the allotted plan of at most its stored bits."""
    rows = []
    ours: dict[float, list[tuple[Plan, Divergence]]] = {}
    for name, quantiser in PEERS.items():
        try:
            model, bits = rounded_copy(bench.subject, quantiser)
        except Unavailable as error:
            rows.append([f"{name}: not measured ({error})", *[None] * (len(PEER_COLUMNS) - 1)])
            continue
        if bits not in ours:
            plans = [bench.plan(bits, uniform=uniform) for uniform in (True, False)]
            ours[bits] = [(plan, bench.measure(plan)) for plan in plans]
        (uniform, uniform_loss), (allotted, allotted_loss) = ours[bits]
        loss = bench.score(model)
        row = [name, bits, loss.kl, loss.kl_stderr, loss.ppl]
        row += [uniform.tensors[0].codec, uniform.bits, uniform_loss.kl, uniform_loss.ppl]
        row += [allotted.bits, allotted_loss.kl, allotted_loss.ppl]
        rows.append(row)
        for kind, ratio in (("uniform", uniform_loss.kl / loss.kl), ("allotted", allotted_loss.kl / loss.kl)):
            report.criterion(f"{kind}_kl_over_{name.lower().replace(' ', '_')}", ratio, "< 1", ratio < 1)
        report.results["ppl_reference"] = loss.ppl_reference
    report.table("KL in nats per token, and perplexity", PEER_COLUMNS, rows, key="peers")
    report.note(f"perplexity of the model itself: {report.results['ppl_reference']:.2f}")


def compare_allotment(report: BenchmarkReport, bench: QualityBench) -> None:
    """What allotting gains over one grid for all, with the whole menu and with scalar grids only."""
    rows = []
    for menu, codecs in (("all grids", ()), ("scalar grids", SCALAR_GRIDS)):
        uniform = bench.plan(ALLOTTED_BITS, uniform=True, codecs=codecs)
        uniform_loss = bench.measure(uniform)
        # At the uniform plan's own bits too: the best single grid may leave some of the budget unused.
        for bits in (ALLOTTED_BITS, uniform.bits):
            allotted = bench.plan(bits, uniform=False, codecs=codecs)
            loss = bench.measure(allotted)
            ratio = loss.kl / uniform_loss.kl
            rows.append(
                [menu, bits, uniform.tensors[0].codec, uniform.bits, uniform_loss.kl, allotted.bits, loss.kl, ratio]
            )
            if bits == ALLOTTED_BITS:
                name = f"allotted_kl_over_uniform_{bits}_bits_{menu.replace(' ', '_')}"
                report.criterion(name, ratio, f"<= {ALLOTTED_GOAL}", ratio <= ALLOTTED_GOAL)
    columns = ["menu", "budget bits", "uniform grid", "uniform bits", "uniform KL", "allotted bits", "allotted KL"]
    report.table(f"allotted against uniform at {ALLOTTED_BITS} bits", [*columns, "ratio"], rows, key="allotment")


@torch.no_grad()
def rounded_copy(subject: OpenedModel, quantiser: Quantiser) -> tuple[torch.nn.Module, float]:
    """A copy of the subject's model with every matrix quantised, and the stored bits per weight of these matrices."""
    result = copy.deepcopy(subject.model)
    parameters = dict(result.named_parameters())
    bits = weights = 0.0
    for matrix in subject.architecture.matrices:
        weight = matrix_view(parameters[matrix.parameter], matrix)
        rounded = quantiser(weight)
        bits += 8 * rounded.size_bytes
        weights += weight.numel()
        weight.copy_(rounded.weight)
    return result, bits / weights


PEERS: dict[str, Quantiser] = {
    **{
        f"INT{bits} {label}": partial(round_to_nearest, bits=bits, zero=zero)
        for bits in (3, 4)
        for label, zero in (("symmetric", "none"), ("zero point", "integer"), ("minimum", "minimum"))
    },
    **{f"HQQ{bits} axis {axis}": partial(hqq, bits=bits, axis=axis) for bits in (3, 4) for axis in (1, 0)},
    "NF4": partial(bnb_4bit, kind="nf4", double=False),
    "NF4 double": partial(bnb_4bit, kind="nf4", double=True),
}


if __name__ == "__main__":
    main()
