"""Methods compared at their true bytes: same model, same matrices, same text, same context, error bars.

base.py      what a method is; one row per method
stored.py    the bytes of a weight file, counted the same way for all
ours.py      plans, packed and decoded again
rounding.py, peers.py, ggml.py, mixtures.py, gptq.py    the others, through their own libraries
slim.py, billm.py    of those that have none for a CPU; columns.py what they share, layerwise.py layer after layer
methods.py   all of them, by name
cache.py     results on disk
run.py       subject + methods ──► Comparison
curve.py     what our plans promise over a range of sizes
plot.py      KL against bytes
"""

from waterfill.studies.comparison import ggml, gptq, mixtures, peers, rounding
from waterfill.studies.comparison.base import (
    FED_BACK,
    OURS,
    PLAIN,
    UNIFORM,
    Candidate,
    Method,
    Row,
    StudiedModel,
    Unavailable,
)
from waterfill.studies.comparison.curve import CurvePoint, predicted_curve
from waterfill.studies.comparison.methods import METHODS, known, select
from waterfill.studies.comparison.run import DEFAULT_BITS, Comparison, compare_methods

__all__ = [
    "DEFAULT_BITS",
    "FED_BACK",
    "METHODS",
    "OURS",
    "PLAIN",
    "UNIFORM",
    "Candidate",
    "Comparison",
    "CurvePoint",
    "Method",
    "Row",
    "StudiedModel",
    "Unavailable",
    "compare_methods",
    "ggml",
    "gptq",
    "known",
    "mixtures",
    "peers",
    "predicted_curve",
    "rounding",
    "select",
]
