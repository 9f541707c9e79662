"""What is known of a reference's predictions, and how a model's logits compare with it.

`Exact`    its logits, bit for bit
`TopK`     the likeliest tokens, the probability of all others together, and a sample of them
`Rounded`  16-bit log-probabilities, as llama-perplexity writes them

Each gives its rows some at a time, and compares them with the logits of a model, [targets, vocab].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from waterfill.evaluation.scoring import check_finite, rows_in_scratch

SAMPLED = 16  # tokens beyond the kept ones, per position: their mean replaces a sum over tens of thousands
ROUNDED_FLOOR = -16.0  # log-probabilities at or below are left out of llama.cpp's sum
ROW_ENTRY_BYTES = 4 * 8  # two log-probabilities, their difference, one probability


class Scores(NamedTuple):
    """float64 [targets] each."""

    kl: Tensor  # KL(reference || model), nats; an estimate without bias where the reference is known in part
    agrees: Tensor  # 1 where both rank the same token first, else 0
    nll: Tensor
    nll_reference: Tensor
    kl_low: Tensor  # bounds that the exact KL cannot leave; both are `kl` where the reference is known in full
    kl_high: Tensor
    kl_variance: Tensor  # of the estimate, from sampling


def score(expected: Expected, logits: Tensor, targets: Tensor) -> Tensor:
    """`Scores` as one tensor, float64 [columns, targets], of a model's logits [targets, vocab].

    Raises:
        WaterfillError: one of the two is not finite.
    """
    rows = rows_in_scratch(logits.shape[-1], ROW_ENTRY_BYTES)
    known: Sequence[Expected] = expected.rows(rows)
    pieces = zip(known, logits.split(rows), targets.split(rows), strict=True)
    scores = Scores(*map(torch.cat, zip(*(some.compare(given, wanted) for some, given, wanted in pieces), strict=True)))
    check_finite(scores.nll_reference, "the reference")
    check_finite(scores.nll, "the model")
    check_finite(scores.kl, "one of the two models")
    return torch.stack(scores)


def log_probabilities(logits: Tensor) -> Tensor:
    """Logits [rows, vocab] as log-probabilities. KL is second order in their difference, so float32 would drown small
    ones in rounding; Apple's GPUs have nothing wider."""
    wide = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    return wide - wide.logsumexp(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Exact:
    """All logits."""

    logits: Tensor  # [targets, vocab], in the model's dtype

    def rows(self, rows: int) -> list[Exact]:
        """The same, `rows` positions at a time."""
        return [Exact(part) for part in self.logits.split(rows)]

    def compare(self, logits: Tensor, targets: Tensor) -> Scores:
        """Scores of a model's logits [targets, vocab] at token ids [targets]."""
        expected, targets = self.logits.to(logits.device), targets.to(logits.device)
        log_p, log_q = log_probabilities(expected), log_probabilities(logits)
        kl = (log_p - log_q).mul_(log_p.exp()).sum(dim=-1).clamp_(min=0)  # rounding alone can make it negative
        return _scores(kl, expected.argmax(dim=-1), logits, log_q, targets, -_at(log_p, targets))


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens with their probabilities, and what can be said of the rest.

    Over the rest, KL is at least what merging them into one token gives, and at most what it would be if all of their
    probability lay where the model's is least. Between the two, sampled tokens give an estimate without bias: with
    u = q / p, Σ p ln(p/q) = Σ p (u - 1 - ln u) + Σ p - Σ q, where the last two sums are known and the first, of second
    order and never negative, is the one to sample.
    """

    logits: Tensor  # [targets, k], in the model's dtype
    tokens: Tensor  # int32 [targets, k]
    log_sum: Tensor  # float64 [targets]: of the exponentials of all logits
    rest: Tensor  # float64 [targets]: probability of all other tokens
    rest_entropy: Tensor  # float64 [targets]: -Σ p ln p over them
    sampled_logits: Tensor  # [targets, SAMPLED], of tokens drawn from the rest in proportion to their probability
    sampled: Tensor  # int32 [targets, SAMPLED]
    top: Tensor  # int32 [targets]: the likeliest token
    target_logits: Tensor  # [targets]

    def rows(self, rows: int) -> list[TopK]:
        parts = zip(*(getattr(self, name).split(rows) for name in self.__dataclass_fields__), strict=True)
        return [TopK(*part) for part in parts]

    def compare(self, logits: Tensor, targets: Tensor) -> Scores:
        device = logits.device
        here = TopK(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))
        log_q, tokens, sampled = log_probabilities(logits), here.tokens.long(), here.sampled.long()
        log_p = here.logits.to(log_q.dtype) - here.log_sum[:, None].to(log_q.dtype)
        kept = (log_p.exp() * (log_p - log_q.gather(1, tokens))).sum(dim=-1)
        others = log_q.scatter(1, tokens, -torch.inf)
        rest_q = others.exp().sum(dim=-1)
        rest = here.rest.to(log_q.dtype)
        log_p_sampled = here.sampled_logits.to(log_q.dtype) - here.log_sum[:, None].to(log_q.dtype)
        log_u = log_q.gather(1, sampled) - log_p_sampled
        excess = log_u.expm1() - log_u
        low = (kept + torch.xlogy(rest, rest) - torch.xlogy(rest, rest_q)).clamp_(min=0)
        least = log_q.scatter(1, tokens, torch.inf).amin(dim=-1)
        high = torch.where(rest > 0, kept - here.rest_entropy.to(log_q.dtype) - rest * least, kept)
        scores = _scores(
            kept + rest - rest_q + rest * excess.mean(dim=-1),
            here.top,
            logits,
            log_q,
            targets.to(device),
            here.log_sum - here.target_logits.to(here.log_sum.dtype),
        )
        variance = rest.square() * excess.var(dim=-1) / excess.shape[-1]
        return scores._replace(
            kl_low=low.cpu().double(), kl_high=high.cpu().double(), kl_variance=variance.cpu().double()
        )


def condense(logits: Tensor, targets: Tensor, kept: int, generator: torch.Generator) -> TopK:
    """The `kept` likeliest tokens of logits [targets, vocab], which are fewer than the vocabulary, and a sample of the
    rest."""
    parts = []
    rows = rows_in_scratch(logits.shape[-1], ROW_ENTRY_BYTES)
    for part, wanted in zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True):
        top = part.topk(kept, dim=-1)
        log_p = log_probabilities(part)
        others = log_p.exp().scatter(1, top.indices, 0)
        rest = others.sum(dim=-1)
        drawn = torch.multinomial(
            others.float().cpu().clamp_(min=1e-45), SAMPLED, replacement=True, generator=generator
        )
        drawn = drawn.to(part.device)
        parts.append(
            TopK(
                logits=top.values,
                tokens=top.indices.int(),
                log_sum=part.to(log_p.dtype).logsumexp(dim=-1),
                rest=rest,
                rest_entropy=-(others * log_p).sum(dim=-1),
                sampled_logits=part.gather(1, drawn),
                sampled=drawn.int(),
                top=part.argmax(dim=-1).int(),
                target_logits=_at(part, wanted),
            )
        )
    return TopK(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in TopK.__dataclass_fields__))


@dataclass(frozen=True)
class Rounded:
    """Log-probabilities in steps of 1/65535 of their range, from 16 below the largest, as llama.cpp has them."""

    log_p: Tensor  # float32 [targets, vocab]

    def rows(self, rows: int) -> list[Rounded]:
        return [Rounded(part) for part in self.log_p.split(rows)]

    def compare(self, logits: Tensor, targets: Tensor) -> Scores:
        log_q = log_probabilities(logits)
        log_p, targets = self.log_p.to(logits.device, log_q.dtype), targets.to(logits.device)
        terms = log_p.exp() * (log_p - log_q)
        kl = terms.masked_fill_(log_p <= ROUNDED_FLOOR, 0).sum(dim=-1)  # llama.cpp's can be negative as well
        return _scores(kl, log_p.argmax(dim=-1), logits, log_q, targets, -_at(log_p, targets))


Expected = Exact | TopK | Rounded


def _scores(kl: Tensor, top: Tensor, logits: Tensor, log_q: Tensor, targets: Tensor, nll_reference: Tensor) -> Scores:
    agrees = top == logits.argmax(dim=-1)
    columns = (kl, agrees, -_at(log_q, targets), nll_reference, kl, kl, torch.zeros_like(kl))
    return Scores(*(column.cpu().double() for column in columns))


def _at(values: Tensor, targets: Tensor) -> Tensor:
    return values.gather(1, targets[:, None]).squeeze(1)
