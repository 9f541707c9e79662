"""The engine's tokenizers give the ids, conversations and texts of transformers' AutoTokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from waterfill.base.errors import WaterfillError
from waterfill.running.text.defaults import UnsupportedError
from waterfill.running.text.tokenizer import TextStream, Tokenizer
from waterfill.running.text.tokenizer_files import load_tokenizer

CORPUS = [
    "The quick brown fox's 12 dogs, 345 cats\n\n  and a 日本語 text — naïve café 🙂",
    "def f(x):\n    return x",
] * 3
SPECIAL = ["<|endoftext|>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{%- for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}\n"
    "    {%- if loop.index > 9 %}{% break %}{% endif %}\n"
    "<|im_start|>{{ m.role }}\n{% generation %}{{ m['content'] | trim }}{% endgeneration %}<|im_end|>\n{% endfor %}\n"
    "{%- set ns = namespace(seen=0) %}{% set ns.seen = ns.seen + 1 %}{{ ns.seen }}{{ dict(a='<é>') | tojson }}\n"
    "{{ dict.fromkeys('ab', 1) }}"
    "{{ bos_token }}{% if tools is none and add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "Où est 日本?\n<|im_end|>🙂"},
]


def write(path: Path, backend: Backend, model_type: str = "llama", **settings: Any) -> Path:
    """The tokenizer files of an artifact."""
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def bytes_backend(*, bos: bool = False, vocabulary: int = 400) -> Backend:
    """Byte-level BPE, as of GPT-2, Qwen and Llama 3."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return backend


def pieces_backend() -> Backend:
    """BPE of pieces with a fallback to bytes, as of Llama 2; it begins texts with <s>."""
    backend = bytes_backend()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trained = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    found = json.loads(trained.to_str())
    found["added_tokens"] = found["added_tokens"][: len(SPECIAL)]
    backend = Backend.from_str(json.dumps(found))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return backend


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "as it is": (
        bytes_backend,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "no class": (lambda: bytes_backend(bos=True), {"bos_token": "<s>", "chat_template": CHAT}),
    "add_bos_token": (
        bytes_backend,
        {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "add_bos_token": True},
    ),
    "Llama 3": (
        lambda: bytes_backend(bos=True),
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "add_bos_token": False, "chat_template": CHAT},
    ),
    "new tokens": (
        bytes_backend,
        {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "additional_special_tokens": ["fox", "<|im_end|>"],
            "chat_template": CHAT,
        },
    ),
    "listed tokens": (
        bytes_backend,
        {
            "tokenizer_class": "TokenizersBackend",
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "normalized": False},
            "eos_token": "quick",
            "added_tokens_decoder": {
                "500": {"content": "quick", "lstrip": False, "normalized": False, "special": False},
                "501": {"content": "naïve", "lstrip": True, "normalized": True, "special": True},
            },
        },
    ),
    "GPT-2": (
        bytes_backend,
        {"tokenizer_class": "GPT2Tokenizer", "chat_template": [{"name": "default", "template": CHAT}]},
    ),
    "GPT-2 with a space": (bytes_backend, {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}),
    "Qwen 2": (bytes_backend, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "chat_template": CHAT}),
    "Llama 2": (pieces_backend, {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": CHAT}),
    "Llama 2, legacy": (pieces_backend, {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
    "Gemma": (pieces_backend, {"tokenizer_class": "GemmaTokenizer", "chat_template": CHAT}),
    "Gemma without unknown pieces": (pieces_backend, {"tokenizer_class": "GemmaTokenizer", "unk_token": "<pad>"}),
    "Llama 2 without a space": (pieces_backend, {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}),
}
MODELS = {("qwen2", "PreTrainedTokenizerFast"), ("qwen2", None), ("qwen3", "PreTrainedTokenizerFast"), ("qwen3", None),
          ("mistral", "LlamaTokenizer"), ("mistral", "GPT2Tokenizer"), ("mistral", None), ("llama", None),
          ("gemma3_text", "GemmaTokenizer"), ("gemma3_text", "PreTrainedTokenizerFast"),
          ("gemma3_text", None)}  # fmt: skip

texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*SPECIAL, *" \n\t.,'1é日🙂￼", "  ", "The", " fox", "naïve", "x's", "quick"]), max_size=12
    ).map("".join),
)


class Pair:
    """A tokenizer as the engine loads it, and as transformers does."""

    def __init__(self, path: Path) -> None:
        self.ours, self.theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)

    def check(self, text: str) -> None:
        if text or self.theirs.bos_token_id is not None:
            assert self.ours.prompt_ids(text) == (self.theirs(text)["input_ids"] or [self.theirs.bos_token_id])
        ids = self.theirs(text, add_special_tokens=False)["input_ids"]
        assert self.ours.decode(ids) == self.theirs.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, ref_llama: Path) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {name: write(root / name, make(), **settings) for name, (make, settings) in CASES.items()}
    for model_type, kind in MODELS:
        settings = {} if kind is None else {"tokenizer_class": kind}
        found[f"{model_type} {kind}"] = write(root / f"{model_type} {kind}", bytes_backend(), model_type, **settings)
    return {name: Pair(path) for name, path in {**found, "ref-llama": ref_llama}.items()}


@given(texts)
@example("")
@example(" leading")
@example("1234 <s> naïve")
def test_ids_and_texts_equal_those_of_transformers(pairs: dict[str, Pair], text: str) -> None:
    for pair in pairs.values():
        pair.check(text)


def test_loaded_parts_equal_those_of_transformers(pairs: dict[str, Pair]) -> None:
    for name, pair in pairs.items():
        ours, theirs = (json.loads(b.to_str()) for b in (pair.ours.backend, pair.theirs.backend_tokenizer))
        assert ours["added_tokens"] == theirs["added_tokens"], name
        assert pair.ours.special_tokens == pair.theirs.special_tokens_map, name


def test_conversations_equal_those_of_transformers(pairs: dict[str, Pair]) -> None:
    rendered = 0
    for name, pair in pairs.items():
        if pair.theirs.chat_template is not None:
            wanted = pair.theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
            assert pair.ours.prompt_ids(TALK) == wanted, name
            rendered += 1
        else:
            lines = "System:  Be <brief> & kind. \nUser: Où est 日本?\n<|im_end|>🙂\nAssistant:"
            assert pair.ours.prompt_ids(TALK) == pair.theirs(lines)["input_ids"], name
    assert rendered == 7


def test_files_of_templates_come_before_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "a", bytes_backend(), bos_token="<s>", chat_template="settings")
    (path / "chat_template.jinja").write_text("file {{ messages[1].content }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    pair = Pair(path)
    assert pair.ours.prompt_ids(TALK) == pair.theirs.apply_chat_template(TALK)["input_ids"]
    assert pair.ours.decode(pair.ours.prompt_ids(TALK)) == "file Où est 日本?\n🙂"
    (path / "chat_template.jinja").unlink()
    with pytest.raises(WaterfillError, match="chat templates are tool_use and none is the default"):
        load_tokenizer(path).prompt_ids(TALK)


@pytest.mark.parametrize("kind", ["TokenizersBackend", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_plain_token_that_is_named_becomes_special(tmp_path: Path, kind: str) -> None:
    backend = bytes_backend()
    backend.add_tokens([AddedToken("quick", special=False, rstrip=True)])
    pair = Pair(write(tmp_path / "a", backend, tokenizer_class=kind, eos_token="quick"))
    for text in ("The quick  brown", "a\nquick"):
        pair.check(text)
    assert pair.ours.backend.get_added_tokens_decoder() == pair.theirs.added_tokens_decoder
    assert "quick" not in pair.ours.decode(pair.ours.prompt_ids("The quick  brown"))


def test_tokens_of_an_older_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a", bytes_backend(), tokenizer_class="TokenizersBackend", bos_token="<unk>")
    old = {"bos_token": {"content": "<s>", "lstrip": True}, "additional_special_tokens": ["brown"]}
    (path / "special_tokens_map.json").write_text(json.dumps(old))
    pair = Pair(path)
    assert pair.ours.special_tokens == pair.theirs.special_tokens_map == {"bos_token": "<s>"}
    pair.check("a brown <s> fox")


@pytest.mark.parametrize("template", [None, CHAT])
def test_prompts_that_cannot_be_continued_are_refused(template: str | None) -> None:
    tokenizer = Tokenizer(bytes_backend(), {}, {} if template is None else {"default": template})
    text = os.fsdecode(b"caf\xe9")
    for prompt in (text, [{"role": "user", "content": "coffee?"}, {"role": "user", "content": text}]):
        with pytest.raises(WaterfillError, match=r"not valid UTF-8: its character 4 is '\\udce9'; write it in UTF-8"):
            tokenizer.prompt_ids(prompt)
    with pytest.raises(WaterfillError, match="give at least one"):
        tokenizer.prompt_ids([])
    with pytest.raises(WaterfillError, match="'role' and 'content'"):
        tokenizer.prompt_ids([{"role": "user"}])
    with pytest.raises(WaterfillError, match="the prompt is empty and the tokenizer has no token to begin with"):
        tokenizer.prompt_ids("")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHAT, "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(_a=1) }}", "cannot have the name _a"),
        ("{% set n = namespace() %}{% set n.__a = 1 %}", "cannot have the name __a"),
        ("{{ dict.fromkeys.__globals__.items() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_that_refuse_or_do_what_they_must_not(template: str, reason: str) -> None:
    tokenizer = Tokenizer(bytes_backend(), {}, {"default": template})
    said = f"the model's chat template (refuses the conversation|is no Jinja) .*({reason})"
    with pytest.raises(WaterfillError, match=said):
        tokenizer.prompt_ids([{"role": "bad", "content": "hello"}])


@given(texts)
@example("日本🙂é " * 3)
@example("  two  spaces ")
def test_streams_give_the_text_of_all_ids(pairs: dict[str, Pair], text: str) -> None:
    for pair in pairs.values():
        ids = pair.theirs(text)["input_ids"]
        stream = TextStream(pair.ours)
        pieces = [stream.add(token) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces), "no half of a character"
        assert "".join([*pieces, stream.end()]) == pair.theirs.decode(ids, skip_special_tokens=True)


def test_characters_come_whole_and_ends_that_are_none_at_the_end(pairs: dict[str, Pair]) -> None:
    for name in ("as it is", "Llama 2"):
        tokenizer = pairs[name].ours
        ids = tokenizer.backend.encode("a🚀 b", add_special_tokens=False).ids
        stream = TextStream(tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert [piece for piece in pieces if piece][:2] == ["a", "🚀"]
        assert pieces.index("🚀") > 1, "its bytes are several tokens"
        stream = TextStream(tokenizer)
        cut = ids[: pieces.index("🚀")]
        assert "".join(map(stream.add, cut)) == "a"
        assert stream.end() == tokenizer.decode(cut)[1:] != ""
        assert stream.end() == ""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tokenizer_class": "CohereTokenizer"}, "of class CohereTokenizer"),
        ({"auto_map": {"AutoTokenizer": [None, "x.Y"]}}, "sets auto_map"),
        ({"fix_mistral_regex": True}, "sets fix_mistral_regex"),
        ({"bos_token": {"content": "<s>"}}, "given as a special token"),
        ({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {}}, "other added tokens"),
        ({"added_tokens_decoder": {"7": {"content": 5}}}, "cannot be understood"),
        ({"added_tokens_decoder": [1]}, "cannot be understood"),
        ({"chat_template": [{"name": "default"}]}, "cannot be understood"),
    ],
)
def test_what_transformers_has_to_do(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        load_tokenizer(write(tmp_path / "a", bytes_backend(), **settings))


def test_files_that_tell_too_little(tmp_path: Path, ref_llama: Path) -> None:
    path = write(tmp_path / "a", bytes_backend(), "gemma")
    with pytest.raises(UnsupportedError, match="type gemma may have a tokenizer class of their own"):
        load_tokenizer(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    load_tokenizer(path)
    for name, content, reason in (
        ("added_tokens.json", "{}", "added_tokens.json is a file of older"),
        ("tekken.json", "{}", "of another kind"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer.json", "{", "no tokenizer.json that can be read"),
    ):
        spoilt = shutil.copytree(path, tmp_path / name)
        (spoilt / name).write_text(content)
        with pytest.raises(UnsupportedError, match=reason):
            load_tokenizer(spoilt)
    empty = Backend(models.BPE())
    empty.add_special_tokens(["<s>"])
    with pytest.raises(UnsupportedError, match="no tokens of text"):
        load_tokenizer(write(tmp_path / "empty", empty, bos_token="<s>"))
    words = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UnsupportedError, match="spaces cleaned up"):
        load_tokenizer(write(tmp_path / "words", words, clean_up_tokenization_spaces=True))
    with pytest.raises(UnsupportedError, match="WordLevel instead of BPE"):
        load_tokenizer(write(tmp_path / "qwen", words, "qwen2", eos_token="a", pad_token="a", unk_token="a"))
