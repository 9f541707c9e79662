"""What llama-perplexity prints: by the program itself, or by its algorithm on logits that llama-cpp-python gives.

The program is found on the PATH or named by `--llama-perplexity`. It is not part of llama-cpp-python, but its source is
(vendor/llama.cpp/tools/perplexity). The replica follows that source in numpy, 16-bit file, float32 sums and clipping
included; nothing of waterfill's computes in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from waterfill.evaluation import Divergence

CONTEXT = 512
RUNS = 6
Printed = dict[str, tuple[float, float]]  # what was printed, and a unit of its last digit

# name in waterfill's results: (what llama-perplexity calls it, digits of the value, digits of its error)
PPL_LINES = {
    "ppl": ("Mean PPL(Q)", 6, 6),
    "ppl_reference": ("Mean PPL(base)", 6, 6),
    "correlation": ("Cor(ln(PPL(Q)), ln(PPL(base)))", 2, None),
    "log_ppl_ratio": ("Mean ln(PPL(Q)/PPL(base))", 6, 6),
    "ppl_ratio": ("Mean PPL(Q)/PPL(base)", 6, 6),
    "ppl_difference": ("Mean PPL(Q)-PPL(base)", 6, 6),
}
KL_QUANTILES = {99.9: "99.9%   KLD", 99: "99.0%   KLD", 95: "95.0%   KLD", 90: "90.0%   KLD", 50: "Median  KLD"}
KL_QUANTILES |= {10: "10.0%   KLD", 5: "5.0%   KLD", 1: "1.0%   KLD", 0.1: "0.1%   KLD"}
KL_QUANTILES |= {100: "Maximum KLD", 0: "Minimum KLD"}
DELTA_QUANTILES = {99.9: "99.9%   Δp", 99: "99.0%   Δp", 95: "95.0%   Δp", 90: "90.0%   Δp", 75: "75.0%   Δp"}
DELTA_QUANTILES |= {50: "Median  Δp", 25: "25.0%   Δp", 10: "10.0%   Δp", 5: "5.0%   Δp", 1: "1.0%   Δp"}
DELTA_QUANTILES |= {0.1: "0.1%   Δp", 100: "Maximum Δp", 0: "Minimum Δp"}

_NUMBER = r"(-?\d+\.(\d+))"


def find_program(named: Path | None) -> Path | None:
    found = shutil.which(str(named) if named else "llama-perplexity")
    return Path(found) if found else None


class Program:
    """The program, one window at a time (`-b 512`): with more, its own sums of products differ in the last digits."""

    def __init__(self, path: Path, folder: Path, text: Path, chunks: int) -> None:
        self._path, self._folder, self._text, self._chunks = path, folder, text, chunks

    def perplexity(self, model: Path, *options: str) -> Printed:
        """The final estimate, "ppl" and "ppl ±"."""
        said = self._run(model, "Final estimate:", "-f", str(self._text), *options)
        found = re.search(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}", said)
        assert found, said[-2000:]
        return {"ppl": _printed(found, 1), "ppl ±": _printed(found, 3)}

    def divergence(self, base: Path, model: Path) -> tuple[Printed, Path]:
        """All lines of the report by name, errors by name and " ±"; the file of the base."""
        file = self._folder / f"{base.stem}.kld"
        if not file.exists():
            self._run(base, "Final estimate:", "-f", str(self._text), "--kl-divergence-base", str(file))
        said = self._run(model, "Same top p:", "--kl-divergence-base", str(file), "--kl-divergence")
        lines: Printed = {}
        report = said[said.index("====== Perplexity statistics") :]
        end = report.index("Same top p:")
        for line in [*report[:end].splitlines(), report[end:].partition("\n")[0]]:
            if found := re.match(rf"\s*(.*?)\s*: +{_NUMBER}%?(?: ± +{_NUMBER}| *%)?", line):
                lines[found[1]] = _printed(found, 2)
                if found[4]:
                    lines[f"{found[1]} ±"] = _printed(found, 4)
        return lines, file

    def _run(self, model: Path, last: str, *options: str) -> str:
        """All that it says. Its log is written by a thread that may not get to the end before the program has ended:
        then it is run again, until the `last` line is there."""
        sizes = ["-c", str(CONTEXT), "-b", str(CONTEXT), "-ub", str(CONTEXT), "--chunks", str(self._chunks), "-t", "1"]
        for _ in range(RUNS):
            command = [str(self._path), "-m", str(model), *sizes, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if last in done.stdout + done.stderr:
                return done.stdout + done.stderr
        raise RuntimeError(f"{self._path.name} did not print {last!r}: {done.stderr[-2000:]}")


def _printed(found: re.Match[str], group: int) -> tuple[float, float]:
    return float(found[group]), 10.0 ** -len(found[group + 1])


class Replica:
    """The same from logits that llama-cpp-python computes."""

    def __init__(self, folder: Path, text: Path, chunks: int) -> None:
        self._folder, self._text, self._chunks = folder, text.read_bytes(), chunks
        self._logits: dict[Path, tuple[np.ndarray, np.ndarray, int]] = {}

    def perplexity(self, model: Path, *options: str) -> Printed:
        if options:
            raise ValueError("the replica has no options")
        logits, targets, _ = self._scored(model)
        nll = _nll(logits, targets)
        mean, error = _mean(nll)
        return {"ppl": _rounded(np.exp(mean), 4), "ppl ±": _rounded(np.exp(mean) * error, 5)}

    def divergence(self, base: Path, model: Path) -> tuple[Printed, Path]:
        expected, targets, context = self._scored(base)
        file = self._folder / f"{base.stem}.kld"
        log_p = self._write(file, expected, context)
        logits, _, _ = self._scored(model)
        log_q = _log_softmax(logits)
        kl = np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(axis=1, dtype=np.float64).astype(np.float32)
        rows = np.arange(len(targets))
        nll, nll_base = -log_q[rows, targets], -log_p[rows, targets]
        delta = np.exp(-nll) - np.exp(-nll_base)
        return self._report(kl, nll, nll_base, delta, log_p.argmax(1) == log_q.argmax(1)), file

    def _report(
        self, kl: np.ndarray, nll: np.ndarray, base: np.ndarray, delta: np.ndarray, same: np.ndarray
    ) -> Printed:
        count = len(kl)
        (q, dq), (b, db) = _mean(nll), _mean(base)
        covariance = (np.mean(nll.astype(np.float64) * base) - q * b) / (count - 1)
        ratio_error = np.sqrt(dq**2 + db**2 - 2 * covariance)
        ppl, ppl_base = np.exp(q), np.exp(b)
        difference_error = np.sqrt((ppl * dq) ** 2 + (ppl_base * db) ** 2 - 2 * ppl * ppl_base * covariance)
        values = {
            "ppl": (ppl, ppl * dq),
            "ppl_reference": (ppl_base, ppl_base * db),
            "correlation": (100 * covariance / (dq * db), None),
            "log_ppl_ratio": (q - b, ratio_error),
            "ppl_ratio": (np.exp(q - b), np.exp(q - b) * ratio_error),
            "ppl_difference": (ppl - ppl_base, difference_error),
        }
        lines: Printed = {}
        for key, (name, digits, _) in PPL_LINES.items():
            value, error = values[key]
            lines[name] = _rounded(value, digits)
            if error is not None:
                lines[f"{name} ±"] = _rounded(error, 6)
        mean, error = _mean(kl)
        lines |= {"Mean    KLD": _rounded(mean, 6), "Mean    KLD ±": _rounded(error, 6)}
        lines |= {name: _rounded(np.percentile(kl, at), 6) for at, name in KL_QUANTILES.items()}
        mean, error = _mean(delta)
        lines |= {"Mean    Δp": _rounded(100 * mean, 3), "Mean    Δp ±": _rounded(100 * error, 3)}
        lines |= {name: _rounded(100 * np.percentile(delta, at), 3) for at, name in DELTA_QUANTILES.items()}
        square, error = _mean(delta * delta)
        rms = np.sqrt(square)
        lines |= {"RMS Δp": _rounded(100 * rms, 3), "RMS Δp ±": _rounded(50 * error / rms, 3)}
        top = np.mean(same)
        error = np.sqrt(top * (1 - top) / (count - 1))
        return lines | {"Same top p": _rounded(100 * top, 3), "Same top p ±": _rounded(100 * error, 3)}

    def _scored(self, path: Path) -> tuple[np.ndarray, np.ndarray, int]:
        """Logits [scored, vocab] of the second halves of the windows, their targets, and the windows' tokens."""
        if path not in self._logits:
            import llama_cpp

            model = llama_cpp.Llama(
                str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=1, logits_all=True, flash_attn=True, verbose=False
            )
            tokens = np.array(model.tokenize(self._text, add_bos=True, special=False))[: self._chunks * CONTEXT]
            windows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
            logits, targets, first = [], [], CONTEXT // 2
            adds_bos = llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model.model))
            for window in windows:
                model.reset()
                model.eval([model.token_bos() if adds_bos else window[0].item(), *window[1:].tolist()])
                logits.append(model.scores[first : CONTEXT - 1].copy())
                targets.append(window[first + 1 :])
            self._logits[path] = np.concatenate(logits), np.concatenate(targets), windows
        return self._logits[path]

    def _write(self, file: Path, logits: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """The base's file; its log-probabilities as they are read again."""
        vocabulary = logits.shape[1]
        highest = logits.max(axis=1, keepdims=True)
        least = np.maximum(logits.min(axis=1, keepdims=True), highest - 16)
        log_sum = np.log(np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        scale, floor = (highest - least) / np.float32(65535), least - highest - log_sum
        codes = np.where(logits > least, np.rint((1 / scale) * (logits - least)), 0).astype("<u2")
        padding = np.zeros((len(codes), 2 * ((vocabulary + 1) // 2) - vocabulary), "<u2")
        head = np.concatenate([scale, floor], axis=1).astype("<f4").view("<u2")
        with file.open("wb") as out:
            out.write(b"_logits_" + np.array([CONTEXT, vocabulary, len(windows)], "<i4").tobytes())
            out.write(windows.astype("<i4").tobytes() + np.concatenate([head, codes, padding], axis=1).tobytes())
        return scale * codes.astype(np.float32) + floor


def as_printed(measured: Divergence) -> dict[str, float]:
    """Our figures under llama-perplexity's names and in its units."""
    ppl, kl, token = measured.perplexity_statistics, measured.kl_statistics, measured.token_statistics
    figures: dict[str, float] = {}
    for key, (name, _, error) in PPL_LINES.items():
        estimate = getattr(ppl, key)
        figures[name] = 100 * estimate if error is None else estimate.value
        if error is not None:
            figures[f"{name} ±"] = estimate.error
    figures |= {"Mean    KLD": kl.mean.value, "Mean    KLD ±": kl.mean.error}
    figures |= {name: getattr(kl, _field(at)) for at, name in KL_QUANTILES.items()}
    figures |= {"Mean    Δp": 100 * token.mean.value, "Mean    Δp ±": 100 * token.mean.error}
    figures |= {name: 100 * getattr(token, _field(at)) for at, name in DELTA_QUANTILES.items()}
    figures |= {"RMS Δp": 100 * token.rms.value, "RMS Δp ±": 100 * token.rms.error}
    return figures | {"Same top p": 100 * token.same_top.value, "Same top p ±": 100 * token.same_top.error}


def _field(percent: float) -> str:
    named = {100: "maximum", 50: "median", 0: "minimum"}
    return named.get(percent, f"percentile_{percent:g}".replace(".", "_"))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits - (highest + log_sum)


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -_log_softmax(logits)[np.arange(len(targets)), targets]


def _mean(values: np.ndarray) -> tuple[float, float]:
    mean = np.mean(values, dtype=np.float64)
    variance = np.mean(values.astype(np.float64) ** 2) - mean**2
    return float(mean), float(np.sqrt(max(variance, 0) / (len(values) - 1)))


def _rounded(value: float, digits: int) -> tuple[float, float]:
    return round(float(value), digits), 10.0**-digits
