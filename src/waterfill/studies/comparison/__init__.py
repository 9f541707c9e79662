"""Methods compared at their true bytes: same model, same matrices, same text, same context, error bars.

base.py      what a method is; the registry; one row per method
stored.py    the bytes of a weight file, counted the same way for all
ours.py      plans, packed and decoded again
rounding.py, peers.py, ggml.py, gptq.py    the others, through their own libraries
moments.py   what calibrated peers want to know of the activations
cache.py     results on disk
run.py       subject + methods ──► Comparison
curve.py     what our plans promise over a range of sizes
plot.py      KL against bytes
"""

from waterfill.studies.comparison import ggml, gptq, mixtures, peers, rounding
from waterfill.studies.comparison.base import (
    OURS,
    Candidate,
    Method,
    Row,
    StudiedModel,
    Unavailable,
    known,
    register,
    select,
)
from waterfill.studies.comparison.curve import CurvePoint, predicted_curve
from waterfill.studies.comparison.run import DEFAULT_BITS, Comparison, compare_methods

__all__ = [
    "DEFAULT_BITS",
    "OURS",
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
    "register",
    "rounding",
    "select",
]
