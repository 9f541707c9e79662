"""Fit a large language model into a byte budget, know the loss before you run it, and run it.

The main path, in call order:

    plan = waterfill.plan("org/model", size="2.5GB")      # api.py: architecture.describe, sensitivity.measure, planner
    waterfill.pack("org/model", "out", plan=plan)         # pack.py: rows → codecs → artifact
    model = waterfill.load("out")                         # hf.py: a transformers model that runs from its codes
    waterfill.generate(model, tokenizer, "Once upon")     # runtime/generate.py
    waterfill.evaluate("out", "org/model", "text.txt")    # evaluate/: prediction beside measurement

Importing waterfill also teaches transformers to load artifacts with `AutoModelForCausalLM.from_pretrained("out")`.
"""

from waterfill import hf
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
from waterfill.errors import ArtifactError, BudgetError, CheckpointError, WaterfillError
from waterfill.plan import Plan
from waterfill.runtime.generate import generate

hf.register()

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CheckpointError",
    "Evaluation",
    "Inspection",
    "Plan",
    "WaterfillError",
    "__version__",
    "evaluate",
    "generate",
    "inspect",
    "load",
    "pack",
    "plan",
    "sensitivity",
]
