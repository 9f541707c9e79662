"""Fit a large language model into a byte budget, know the loss before you run it, and run it.

The main path, in call order:

    plan = waterfill.plan("org/model", size="2.5GB")      # files/architecture, planning/
    waterfill.pack("org/model", "out", plan=plan)         # packing/, codecs/: rows → artifact
    model = waterfill.load("out")                         # running/: runs from its codes
    waterfill.generate(model, tokenizer, "Once upon")     # running/hf, or without: Engine
    waterfill.evaluate("out", "org/model", "text.txt")    # evaluation/: prediction, measured
    waterfill.report("out", original="org/model")         # studies/report/: one page of all
    waterfill.compare("org/model", "text.txt")            # studies/comparison/: equal bytes
    waterfill.prune("org/model", "smaller", keep_share=.8)  # tuning/pruning/: parts left out
    waterfill.tune("out", "tuned", text="text.txt")       # tuning/: scales, norms, adapters

Importing waterfill also teaches transformers to load artifacts with `AutoModelForCausalLM.from_pretrained("out")`. It
imports neither torch nor transformers: the verbs do when they are used, and the plug-in joins transformers when that is
imported, before or after.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from waterfill.base.errors import ArtifactError, BudgetError, CheckpointError, WaterfillError
from waterfill.base.lazy import after_import
from waterfill.base.version import __version__

if TYPE_CHECKING:
    from waterfill.api import Evaluation, Inspection, evaluate, inspect, load, pack, plan, prune, sensitivity
    from waterfill.packing.seal import Sealed, seal
    from waterfill.planning.plan import Plan
    from waterfill.running.engine.engine import Engine
    from waterfill.running.hf.generate import generate
    from waterfill.running.runner import Runner, open_runner
    from waterfill.studies.comparison import Comparison
    from waterfill.studies.comparison.study import compare
    from waterfill.studies.diagnosis.doctor import diagnose
    from waterfill.studies.report import Report
    from waterfill.studies.report.write import report
    from waterfill.tuning.pruning.prune import Pruned
    from waterfill.tuning.tune import Tuned, tune

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CheckpointError",
    "Comparison",
    "Engine",
    "Evaluation",
    "Inspection",
    "Plan",
    "Pruned",
    "Report",
    "Runner",
    "Sealed",
    "Tuned",
    "WaterfillError",
    "__version__",
    "compare",
    "diagnose",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "open_runner",
    "pack",
    "plan",
    "prune",
    "report",
    "seal",
    "sensitivity",
    "tune",
]

_HOMES = {
    **dict.fromkeys(
        ("Evaluation", "Inspection", "evaluate", "inspect", "load", "pack", "plan", "prune", "seal", "sensitivity"),
        "waterfill.api",
    ),
    "diagnose": "waterfill.studies.diagnosis.doctor",
    "Comparison": "waterfill.studies.comparison",
    "Engine": "waterfill.running.engine.engine",
    "Plan": "waterfill.planning.plan",
    "Pruned": "waterfill.tuning.pruning.prune",
    "Report": "waterfill.studies.report",
    "Runner": "waterfill.running.runner",
    "Sealed": "waterfill.packing.seal",
    "Tuned": "waterfill.tuning.tune",
    "compare": "waterfill.studies.comparison.study",
    "generate": "waterfill.running.hf.generate",
    "open_runner": "waterfill.running.runner",
    "report": "waterfill.studies.report.write",
    "tune": "waterfill.tuning.tune",
}


def __getattr__(name: str) -> Any:
    """A public name, imported from its own module when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'waterfill' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after_import("transformers.quantizers", lambda: import_module("waterfill.running.hf.plugin"))
