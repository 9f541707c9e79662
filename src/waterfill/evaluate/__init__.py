"""Measuring a model on text: perplexity alone, or divergence from the model that it was packed from.

token_ids(tokenizer, path) -> ids -> perplexity(model, ids, context=…)
                                  -> divergence(reference, model, ids, context=…)
"""

from waterfill.evaluate.divergence import Divergence, divergence
from waterfill.evaluate.perplexity import Perplexity, perplexity
from waterfill.evaluate.text import default_context, token_ids, windows

__all__ = ["Divergence", "Perplexity", "default_context", "divergence", "perplexity", "token_ids", "windows"]
