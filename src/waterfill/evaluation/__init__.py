"""Measuring a model on text: perplexity alone, or divergence from the model that it was packed from.

token_ids(tokenizer, path) -> ids -> perplexity(model, ids, convention=…)
                                  -> divergence(reference, model, ids, convention=…)

`conventions` says how a text is cut and scored; `store` keeps a reference's predictions on disk, `reference_file` in a
file to be sent along, `journal` the scores of a run under way. Results are frozen dataclasses with `to_dict`, `to_json`
and `to_pandas`.
"""

from waterfill.base.records import Estimate, Record
from waterfill.evaluation.conventions import CONVENTIONS, Convention, convention
from waterfill.evaluation.divergences import Divergence, divergence
from waterfill.evaluation.kld_file import KldFile
from waterfill.evaluation.perplexities import Perplexity, perplexity
from waterfill.evaluation.store import EvaluationCache, ReferenceStore, evaluation_key
from waterfill.evaluation.text import begin_token, default_context, token_ids, windows

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Divergence",
    "Estimate",
    "EvaluationCache",
    "KldFile",
    "Perplexity",
    "Record",
    "ReferenceStore",
    "begin_token",
    "convention",
    "default_context",
    "divergence",
    "evaluation_key",
    "perplexity",
    "token_ids",
    "windows",
]
