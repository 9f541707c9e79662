"""References on disk: exact ones to the bit, partial ones within bounds; bounded space, continued after a kill."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.measure_samples import CONTEXT, VOCABULARY, random_ids, tiny_llama
from waterfill.base.errors import WaterfillError
from waterfill.evaluation import (
    Divergence,
    EvaluationCache,
    KldFile,
    convention,
    divergence,
    evaluation_key,
    perplexity,
)
from waterfill.evaluation import store as store_module
from waterfill.evaluation.expected import SAMPLED
from waterfill.evaluation.journal import Journal
from waterfill.evaluation.store import ReferenceStore

WINDOWS = 9
HOW = convention("gptq", context=CONTEXT)
EXACT_BYTES = WINDOWS * (CONTEXT - 1) * VOCABULARY * 4


def stored(folder: Path, limit_bytes: int, seed: int = 1, **options: object) -> ReferenceStore:
    store = EvaluationCache(folder, limit_bytes).reference(f"key{seed}")
    cut = HOW.cut(random_ids(WINDOWS * CONTEXT))
    assert store.fill(tiny_llama(seed), cut, HOW, **options)  # type: ignore[arg-type]
    assert store.complete(cut)
    return store


def figures(result: Divergence) -> dict[str, object]:
    return {name: value for name, value in result.to_dict().items() if name != "reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_reference_changes_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    reference, model, ids = tiny_llama(1).to(dtype), tiny_llama(2), random_ids(WINDOWS * CONTEXT)
    store = EvaluationCache(tmp_path).reference("key")
    store.fill(reference, HOW.cut(ids), HOW, batch=4)
    again = EvaluationCache(tmp_path).reference("key")  # as the next process finds it
    assert (again.form, again.kept, again.vocabulary) == ("exact", None, VOCABULARY)
    live, known = divergence(reference, model, ids, context=CONTEXT), divergence(again, model, ids, context=CONTEXT)
    assert figures(known) == figures(live)
    assert (live.reference.form, known.reference.form) == ("live", "exact")
    assert known.reference.kl_low == known.reference.kl_high == pytest.approx(known.kl, rel=1e-12)
    itself = divergence(again, reference, ids, context=CONTEXT)
    assert (itself.kl, itself.kl_max, itself.top1_agreement) == (0, 0, 1)


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReferenceStore:
    """Knows a sixth of the vocabulary."""
    monkeypatch.setattr(store_module, "SMALLEST_KEPT", 8)
    store = stored(tmp_path, int(1.1 * EXACT_BYTES))
    assert store.form == "exact"
    store = stored(tmp_path / "partial", EXACT_BYTES - 1)
    assert store.form == "top-k"
    assert store.kept is not None
    assert 8 <= store.kept <= VOCABULARY - SAMPLED
    return store


def disturbed(noise: float) -> LlamaForCausalLM:
    model = tiny_llama(1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("noise", "precision"), [(0.01, 0.05), (0.1, 0.05), (1.0, 0.5)])
def test_a_partial_reference_keeps_to_its_bounds(noise: float, precision: float, partial: ReferenceStore) -> None:
    ids, model = random_ids(WINDOWS * CONTEXT), disturbed(noise)
    exact = divergence(tiny_llama(1), model, ids, context=CONTEXT)
    known = divergence(partial, model, ids, context=CONTEXT)
    assert known.reference.form == "top-k"
    assert known.reference.kl_low < exact.kl < known.reference.kl_high
    assert 0 < known.reference.kl_sampling_stderr < precision * exact.kl
    assert abs(known.kl - exact.kl) < 4 * known.reference.kl_sampling_stderr
    assert known.ppl_reference == pytest.approx(exact.ppl_reference, rel=1e-12)
    assert known.top1_agreement == exact.top1_agreement
    assert known.ppl == exact.ppl


def test_a_model_does_not_differ_from_its_own_partial_reference(partial: ReferenceStore) -> None:
    result = divergence(partial, tiny_llama(1), random_ids(WINDOWS * CONTEXT), context=CONTEXT)
    assert result.kl == pytest.approx(0, abs=1e-15)
    assert result.reference.kl_low == pytest.approx(0, abs=1e-15)
    assert result.top1_agreement == 1


def test_space_is_bounded_and_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    limit = int(2.5 * EXACT_BYTES)
    stores = []
    for seed in (1, 2, 3):
        stores.append(stored(tmp_path, limit, seed))
        if seed == 2:  # the first is used again, so the second is the oldest
            stores[0].expected(HOW.cut(random_ids(WINDOWS * CONTEXT))[0])
    folders = {folder.name for folder in (tmp_path / "references").iterdir()}
    assert folders == {"key1", "key3"}
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert size <= limit
    assert not EvaluationCache(tmp_path, 1000).reference("small").fill(tiny_llama(1), HOW.cut(random_ids(99)), HOW)
    assert not (tmp_path / "references" / "small").exists()


def test_an_interrupted_reference_is_continued(tmp_path: Path) -> None:
    cut = HOW.cut(random_ids(WINDOWS * CONTEXT))

    def interrupt(done: int, total: int) -> None:
        assert total == WINDOWS
        if done == 4:
            raise KeyboardInterrupt

    store = EvaluationCache(tmp_path).reference("key1")
    with pytest.raises(KeyboardInterrupt):
        store.fill(tiny_llama(1), cut, HOW, progress=interrupt)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(files) == 4
    assert not store.complete(cut)
    seen: list[int] = []
    again = EvaluationCache(tmp_path).reference("key1")
    assert again.fill(tiny_llama(1), cut, HOW, progress=lambda done, _: seen.append(done))
    assert seen == [4, 5, 6, 7, 8, 9]
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())


def test_damaged_references_are_named(tmp_path: Path) -> None:
    store = stored(tmp_path, EXACT_BYTES * 2)
    (store.folder / "00003.safetensors").write_bytes(b"torn")
    with pytest.raises(WaterfillError, match="has lost window 3"):
        divergence(store, tiny_llama(2), random_ids(WINDOWS * CONTEXT), context=CONTEXT)
    (store.folder / "meta.json").write_text("{")
    cut = HOW.cut(random_ids(WINDOWS * CONTEXT))
    assert not EvaluationCache(tmp_path).reference("key1").complete(cut)


def test_keys_tell_everything_apart() -> None:
    ids = random_ids(99)
    others = [
        evaluation_key(ids[1:], HOW, "a"),
        evaluation_key(ids, convention("gptq", context=8), "a"),
        evaluation_key(ids, convention("decode", context=CONTEXT), "a"),
        evaluation_key(ids, convention("llama.cpp", context=CONTEXT), "a"),
        evaluation_key(ids, convention("llama.cpp", context=CONTEXT, bos=1), "a"),
        evaluation_key(ids, HOW, "b"),
        evaluation_key(ids, HOW, "a", "b"),
        evaluation_key(ids, HOW, "a"),
    ]
    assert len({*others}) == len(others)
    assert evaluation_key(ids.clone(), convention(context=CONTEXT), "a") == others[-1]


def test_default_cache_obeys_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATERFILL_CACHE", str(tmp_path))
    monkeypatch.setenv("WATERFILL_CACHE_SIZE", "3MB")
    assert EvaluationCache.default() == EvaluationCache(tmp_path, 3_000_000)
    monkeypatch.delenv("WATERFILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EvaluationCache.default().folder == tmp_path / "waterfill"


@pytest.mark.parametrize("damage", [b"", b"\x07\0\0", b"\xff" * 400])
def test_scores_survive_an_interruption(damage: bytes, tmp_path: Path) -> None:
    """What was computed is not computed again, and what the kill has cut off is."""
    model, ids = tiny_llama(1), random_ids(WINDOWS * CONTEXT)
    whole = perplexity(model, ids, context=CONTEXT)
    path, reads = tmp_path / "scores" / "key", []

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perplexity(model, ids, context=CONTEXT, journal=Journal(path, 1), progress=interrupt)
    with path.open("ab") as file:
        file.write(damage)
    forward = model.forward

    def counted(**options: object) -> object:
        reads.append(options)
        return forward(**options)

    model.forward = counted  # type: ignore[method-assign]
    again = perplexity(model, ids, context=CONTEXT, journal=Journal(path, 1))
    assert again == whole
    assert len(reads) == WINDOWS - 4
    assert perplexity(model, ids, context=CONTEXT, journal=Journal(path, 1)) == whole
    assert len(reads) == WINDOWS - 4


def test_forgotten_journals_are_removed(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path)
    for name, age_days in (("old", 31), ("young", 29)):
        Journal(cache.journal_path(name), 1).add(0, torch.zeros(1, 2, dtype=torch.float64))
        then = time.time() - age_days * 24 * 3600
        os.utime(cache.journal_path(name), (then, then))
    cache.journal_path("new")
    assert [file.name for file in (tmp_path / "scores").iterdir()] == ["young"]


def test_a_journal_drops_what_is_altered(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "key", 2)
    for window in range(3):
        journal.add(window, torch.full((2, 4), float(window), dtype=torch.float64))
    data = bytearray(journal.path.read_bytes())
    data[len(data) // 3 + 40] ^= 1  # in the second record
    journal.path.write_bytes(data)
    assert [window for window, _ in journal.read()] == [0]
    assert [window for window, _ in journal.read()] == [0]
    assert list(Journal(tmp_path / "key", 3).read()) == []


# ----------------------------------------------------------------------------------------------------------------------


def write_kld(path: Path, logits: list[torch.Tensor], ids: torch.Tensor, context: int) -> None:
    """As llama-perplexity does, one entry at a time; logits [context, vocab] of each window."""
    with path.open("wb") as file:
        file.write(b"_logits_" + struct.pack("<3i", context, VOCABULARY, len(logits)))
        file.write(ids[: len(logits) * context].int().numpy().tobytes())
        for window in logits:
            for row in window[context // 2 : -1].double().tolist():
                least = max(min(row), max(row) - 16)
                log_sum = np.log(sum(np.exp(np.array(row) - max(row))))
                scale = (max(row) - least) / 65535
                codes = [round((value - least) / scale) if value > least else 0 for value in row]
                codes += [0] * (2 * ((VOCABULARY + 1) // 2) - VOCABULARY)
                file.write(struct.pack("<2f", scale, least - max(row) - log_sum) + np.array(codes, "<u2").tobytes())


def test_references_of_llama_cpp_are_read(tmp_path: Path) -> None:
    reference, model, ids = tiny_llama(1), tiny_llama(2), random_ids(WINDOWS * CONTEXT)
    with torch.no_grad():
        logits = [reference(window[None]).logits[0] for window in ids.reshape(WINDOWS, CONTEXT)]
    write_kld(tmp_path / "base.kld", logits, ids, CONTEXT)
    file = KldFile(tmp_path / "base.kld")
    assert torch.equal(file.ids, ids)
    how = file.convention(None)
    assert (how.name, how.context, file.windows, file.vocabulary) == ("llama.cpp", CONTEXT, WINDOWS, VOCABULARY)
    known = divergence(file, model, file.ids, context=CONTEXT, convention="llama.cpp")
    exact = divergence(reference, model, ids, context=CONTEXT, convention="llama.cpp")
    assert known.kl == pytest.approx(exact.kl, rel=1e-3)
    assert known.ppl_reference == pytest.approx(exact.ppl_reference, rel=1e-4)
    assert known.ppl == exact.ppl
    assert known.top1_agreement == exact.top1_agreement
    assert known.reference.form == "llama.cpp"


def test_files_that_are_no_references_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    path.write_bytes(b"_logits_")
    with pytest.raises(WaterfillError, match="is no file of `llama-perplexity"):
        KldFile(path)
    path.write_bytes(b"_logits_" + struct.pack("<3i", 16, 61, 3))
    with pytest.raises(WaterfillError, match=r"base\.kld is cut off"):
        KldFile(path)
