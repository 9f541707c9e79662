"""Shorthands for the tests of codecs: a matrix through HIGGS and back, and the noise that this leaves."""

from __future__ import annotations

import torch

from waterfill.codecs import Encoded, Higgs, get_codec, scale_exponent


def higgs(name: str) -> Higgs:
    codec = get_codec(name)
    assert isinstance(codec, Higgs)
    return codec


def encode(name: str, weight: torch.Tensor, rho: float = 1.0) -> Encoded:
    return higgs(name).encode(weight, exponent=scale_exponent(float(weight.abs().max())), rho=rho)


def decode(name: str, weight: torch.Tensor, rho: float = 1.0) -> torch.Tensor:
    return higgs(name).decode(encode(name, weight, rho))


def relative_noise(decoded: torch.Tensor, weight: torch.Tensor) -> float:
    return float((decoded.double() - weight.double()).square().sum() / weight.double().square().sum())
