"""`rate_distortion.py`: real streams of fresh Gaussian weights, and how many bits they take beyond the Shannon bound.

The distance is R + 1/2 log2 t2. R counts all stored bytes of the matrix: heads, scales, tables, states, padding; t2 is
measured on what is decoded, with the MSE scale.
"""

from __future__ import annotations

import math

import torch

from benchmarks.shared.report import BenchmarkReport
from waterfill.codecs import Codec, get_codec

MATRIX, QUICK_MATRIX = (2048, 4096), (192, 4096)
HIGGS_MATRIX = (512, 4096)  # the search of four dimensions takes long; more weights change nothing
RATES, QUICK_RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0), (1.0, 2.0, 3.0)
STATES, QUICK_STATES = (1, 8, 64, 256), (1, 8, 64)
GOALS = {8: 0.10, 64: 0.06, 256: 0.06}
HIGGS = {
    "p=1": ("higgs-p1-n2", "higgs-p1-n4", "higgs-p1-n8", "higgs-p1-n16", "higgs-p1-n32"),
    "p=2": (
        "higgs-p2-n4",
        "higgs-p2-n8",
        "higgs-p2-n16",
        "higgs-p2-n32",
        "higgs-p2-n64",
        "higgs-p2-n256",
        "higgs-p2-n1024",
    ),
    "p=4": ("higgs-p4-n16", "higgs-p4-n64", "higgs-p4-n256", "higgs-p4-n1024", "higgs-p4-n4096"),
}
QUICK_HIGGS = {"p=1": ("higgs-p1-n8",), "p=2": ("higgs-p2-n16", "higgs-p2-n64")}
# (method, bits per weight without scales, t2): from public re-implementations, not measured here.
QUOTED = (
    ("E8P (QuIP#)", 2.0, 0.0921),
    ("QTIP, 65536-state trellis, random table", 1.0, 0.266),
    ("QTIP, 65536-state trellis, random table", 2.0, 0.0680),
    ("QTIP, 65536-state trellis, random table", 3.0, 0.01745),
    ("QTIP, 65536-state trellis, random table", 4.0, 0.00447),
    ("QTIP, 65536-state trellis, 3INST", 2.0, 0.0691),
    ("QTIP, 65536-state trellis, 3INST", 3.0, 0.0181),
    ("QTIP, 65536-state trellis, 3INST", 4.0, 0.00483),
)
AGREEMENT = 1e-4  # relative: what the encoder says that it lost, against what decoding gives
SEED = 20261122
COLUMNS = ["method", "bits", "t²", "gap bits", "gap dB"]


def measure_gaussian(report: BenchmarkReport, quick: bool) -> None:
    weight = torch.randn(QUICK_MATRIX if quick else MATRIX, generator=torch.Generator().manual_seed(SEED))
    rates, rows, worst_mismatch = QUICK_RATES if quick else RATES, [], 0.0
    gaps: dict[int, list[float]] = {}
    for states in QUICK_STATES if quick else STATES:
        for rate in rates:
            bits, t2, mismatch = code(get_codec(f"trellis-s{states}-r{rate:.4f}"), weight)
            what = "trellis, 1 state (uniform + rANS)" if states == 1 else f"trellis, {states} states"
            rows.append(row(what, bits, t2))
            gaps.setdefault(states, []).append(gap(bits, t2))
            worst_mismatch = max(worst_mismatch, mismatch)
    some = weight[: HIGGS_MATRIX[0]]
    for family, names in (QUICK_HIGGS if quick else HIGGS).items():
        rows += [row(f"HIGGS {family}", *code(get_codec(name), some)[:2]) for name in names]
    rows += [row(f"{name} (quoted, scales not counted)", bits, t2) for name, bits, t2 in QUOTED]
    size = "x".join(map(str, weight.shape))
    report.table(f"Gaussian weights {size}, everything stored is counted", COLUMNS, rows, key="gaussian")
    for states, goal in GOALS.items():
        if states in gaps:
            worst = max(gaps[states])
            report.criterion(f"gaussian_most_bits_over_bound_{states}_states", worst, f"<= {goal}", worst <= goal)
    report.criterion(
        "gaussian_decoded_against_encoders_t2", worst_mismatch, f"<= {AGREEMENT}", worst_mismatch <= AGREEMENT
    )


def code(codec: Codec, weight: torch.Tensor) -> tuple[float, float, float]:
    """(stored bits per weight, measured t2, by how much the encoder's own t2 is off, relatively)."""
    encoded = codec.encode(weight, rho=1.0)
    size_bytes = sum(buffer.numel() * buffer.element_size() for buffer in encoded.buffers.values())
    error = (codec.decode(encoded) - weight).double().square().sum()
    t2 = float(error / weight.double().square().sum())
    said = encoded.noise_power / encoded.power
    return 8 * size_bytes / weight.numel(), t2, abs(said / t2 - 1)


def gap(bits: float, t2: float) -> float:
    """By how many bits the rate could be lower at the same distortion."""
    return bits + 0.5 * math.log2(t2)


def row(what: str, bits: float, t2: float) -> list[object]:
    return [what, round(bits, 4), t2, gap(bits, t2), 20 * math.log10(2) * gap(bits, t2)]
