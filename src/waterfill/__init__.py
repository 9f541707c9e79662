"""Fit a large language model into a byte budget, know the loss before you run it, and run it.

The main path, in call order:

    plan = waterfill.plan("org/model", size="2.5GB")      # api.py: architecture.describe, sensitivity.measure, planner
    waterfill.pack("org/model", "out", plan=plan)         # pack.py: rows → codecs → artifact
    model = waterfill.load("out")                         # hf.py: a transformers model that runs from its codes
    waterfill.generate(model, tokenizer, "Once upon")     # runtime/generate.py
    waterfill.evaluate("out", "org/model", "text.txt")    # evaluate/: prediction beside measurement
    waterfill.report("out", original="org/model")         # report/: one page that says it all
    waterfill.compare("org/model", "text.txt")            # compare/: beside other methods, at equal bytes

Importing waterfill also teaches transformers to load artifacts with `AutoModelForCausalLM.from_pretrained("out")`. It
imports neither torch nor transformers: the verbs do when they are used, and the plug-in joins transformers when that is
imported, before or after.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from waterfill._lazy import after_import, export_lazily
from waterfill.errors import ArtifactError, BudgetError, CheckpointError, WaterfillError
from waterfill.version import __version__

if TYPE_CHECKING:
    from waterfill.api import (
        Evaluation,
        Inspection,
        evaluate,
        inspect,
        load,
        pack,
        plan,
        sensitivity,
    )
    from waterfill.api_studies import compare
    from waterfill.compare import Comparison
    from waterfill.engine.engine import Engine
    from waterfill.plan import Plan
    from waterfill.report import Report
    from waterfill.report.write import report
    from waterfill.runtime.generate import generate
    from waterfill.seal import Sealed, seal

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CheckpointError",
    "Comparison",
    "Engine",
    "Evaluation",
    "Inspection",
    "Plan",
    "Report",
    "Sealed",
    "WaterfillError",
    "__version__",
    "compare",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "pack",
    "plan",
    "report",
    "seal",
    "sensitivity",
]

_API = ("Evaluation", "Inspection", "evaluate", "inspect", "load", "pack", "plan", "sensitivity")

export_lazily(
    __name__,
    {
        **dict.fromkeys(_API, "waterfill.api"),
        "compare": "waterfill.api_studies",
        "report": "waterfill.report.write",
        "Comparison": "waterfill.compare",
        "Engine": "waterfill.engine.engine",
        "Plan": "waterfill.plan",
        "Report": "waterfill.report",
        "generate": "waterfill.runtime.generate",
        **dict.fromkeys(("Sealed", "seal"), "waterfill.seal"),
    },
)
after_import("transformers.quantizers", lambda: import_module("waterfill.hf"))
