"""Tokenizers of strangers: how much longer they may make a text, and failures that are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import waterfill
from waterfill.base.errors import WaterfillError
from waterfill.base.reading import SMALL_BYTES
from waterfill.files.original import load_tokenizer
from waterfill.files.settings import tokenizing
from waterfill.files.settings.tokenizing import check_growth, in_words
from waterfill.running.text.tokenizer_files import load_tokenizer as engine_tokenizer

VOCABULARY = {"<s>": 0, "a": 1, "b": 2, " ": 3}


def backend(**parts: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def write(path: Path, made: Tokenizer, **settings: Any) -> Path:
    """The files of a tokenizer that both runners load as it is."""
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def doubling(count: int, kind: Any) -> list[Any]:
    return [kind.Replace("a", "aa") for _ in range(count)]


EXPLODING = {
    "one replacement": {"normalizer": normalizers.Replace("a", "a" * 10_000)},
    "of nothing": {"normalizer": normalizers.Replace(Regex("(?=a)"), "b" * 10_000)},
    "a chain": {"normalizer": normalizers.Sequence(doubling(40, normalizers))},
    "chains in chains": {"normalizer": normalizers.Sequence([normalizers.Sequence(doubling(4, normalizers))] * 9)},
    "a beginning": {"normalizer": normalizers.Prepend("a" * 10_000)},
    "a decoder": {"decoder": decoders.Replace("a", "a" * 10_000)},
    "decoders": {"decoder": decoders.Sequence(doubling(40, decoders))},
    "special tokens": {
        "post_processor": processors.TemplateProcessing(single="<s> " * 5_000 + "$A", special_tokens=[("<s>", 0)])
    },
    "the text, often": {
        "post_processor": processors.TemplateProcessing(single="$A" + " $A" * 5_000, special_tokens=[])
    },
}


@pytest.mark.parametrize("case", EXPLODING)
def test_what_may_explode_is_refused_before_any_text_goes_in(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "a", backend(**EXPLODING[case]))
    for load in (engine_tokenizer, load_tokenizer):
        with pytest.raises(
            WaterfillError, match=r"of the model's tokenizer may make a text .* times as long"
        ) as raised:
            load(path)
        assert type(raised.value) is WaterfillError  # the engine does not leave it to transformers


PARTS: dict[str, Any] = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Lowercase": normalizers.Lowercase(),
    "BertNormalizer": normalizers.BertNormalizer(),
    "ByteLevel": normalizers.ByteLevel(),
    "StripAccents": normalizers.StripAccents(),
    "Nmt": normalizers.Nmt(),
    "Strip": normalizers.Strip(),
    "Prepend": normalizers.Prepend("▁"),
    "Replace": normalizers.Replace(" ", "▁▁"),
    "Replace a pair": normalizers.Replace("ab", "abc"),
    "Replace a pattern": normalizers.Replace(Regex(" {2,}|b(?=a)"), "-+"),
}


@given(
    st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=3),
    st.text(st.sampled_from("ab  éİﷺ日Åﬃ\u0390\n"), min_size=1, max_size=12),
)
def test_no_text_grows_more_than_is_reckoned_with(names: list[str], text: str) -> None:
    part = normalizers.Sequence([PARTS[name] for name in names])
    assert len(part.normalize_str(text)) <= tokenizing._growth(json.loads(part.__getstate__())) * len(text)


def test_tokenizers_as_they_are_known_pass(ref_llama: Path) -> None:
    check_growth(load_tokenizer(ref_llama).backend_tokenizer)
    old = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bert = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    pieces = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    ends = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    for part in (old, bert, pieces):
        check_growth(backend(normalizer=part, post_processor=ends, decoder=decoders.Replace("▁", " ")))


def test_the_longest_replacement_of_a_map_counts() -> None:
    table = b"\x00" * 8
    charsmap = len(table).to_bytes(4, "little") + table + b"ab\x00" + b"x" * 5000 + b"\x00"
    assert tokenizing._longest(charsmap) == 5000
    assert tokenizing._longest(b"") == 1


def test_a_pattern_that_never_ends_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = backend(pre_tokenizer=pre_tokenizers.Split(Regex("(a+)+c"), "isolated"))
    path = write(tmp_path / "a", made)
    with pytest.raises(WaterfillError, match="the model's tokenizer fails on the text"):
        engine_tokenizer(path).prompt_ids("a" * 60)
    with pytest.raises(WaterfillError, match="the model's tokenizer fails on the text"), in_words():
        load_tokenizer(path)("a" * 60)
    capfd.readouterr()  # Rust prints where it failed


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", backend())
    with (path / "tokenizer.json").open("ab") as file:
        file.truncate(SMALL_BYTES + 1)
    for load in (engine_tokenizer, load_tokenizer):
        with pytest.raises(WaterfillError, match=r"tokenizer\.json"):
            load(path)


def test_code_of_a_tokenizer_never_runs_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path = write(tmp_path / "a", backend(), **settings)
    mark = tmp_path / "ran"
    (path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(WaterfillError, match="needs code of its own, which is never run; give files"):
        load_tokenizer(path)
    assert not mark.exists()
    assert capsys.readouterr().out == ""


def test_every_loading_says_that_code_does_not_run() -> None:
    """Without the argument transformers asks on standard input."""
    package = Path(waterfill.__file__).parent
    calls = [
        call.partition(").eval")[0]
        for file in package.rglob("*.py")
        for call in file.read_text("utf-8").split("transformers.Auto")[1:]
        if call.partition("(")[0].endswith(("from_pretrained", "from_config"))
    ]
    assert len(calls) >= 6
    assert all("trust_remote_code=False" in call[:300] for call in calls), calls


def test_what_is_wrong_with_a_tokenizer_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a", backend())
    (path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "nonsense"}}')
    with pytest.raises(WaterfillError, match=r"no tokenizer that transformers can load \(.+\); put the files"):
        load_tokenizer(path)
