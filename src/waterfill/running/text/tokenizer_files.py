"""A tokenizer from the files beside a model, the same that transformers' AutoTokenizer makes of them.

What transformers does depends on the class that the files name. Most are names for tokenizer.json as it is. Four that
models that the engine runs use take vocabulary and post-processor from there and have the other parts in their code;
so has this, for them. Everything else is left to transformers: `UnsupportedError` says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from waterfill.base.errors import UnsupportedError
from waterfill.base.reading import read_small, read_text
from waterfill.files.settings.tokenizing import check_growth, in_words
from waterfill.running.text.defaults import CONFIG_FILE
from waterfill.running.text.tokenizer import Tokenizer

Settings = dict[str, Any]

# tokenizer_class, by the model_type of config.json, where tokenizer_config.json has none.
_CLASS_OF_MODEL = {
    "llama": "",
    "mistral": "",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma3_text": "GemmaTokenizer",
}
_AS_IT_IS = frozenset({"", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend"})  # less a final "Fast"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Class:
    """A tokenizer class whose parts are in transformers' code."""

    parts: Callable[[Backend, Settings], None]  # replaces those of tokenizer.json
    special_tokens: dict[str, str]  # where tokenizer_config.json has none
    plain: bool = False  # whether special tokens lose their options, as that to take the space before with them


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in the directory of an artifact.

    Raises:
        UnsupportedError: there is none, or one of which these files do not tell what transformers makes of it.
    """
    settings, config = _read(path / "tokenizer_config.json"), _read(path / CONFIG_FILE)
    for name in ("auto_map", "fast_tokenizer_files", "fix_mistral_regex"):
        if settings.get(name):
            raise UnsupportedError(f"tokenizer_config.json sets {name}")
    if (path / "tekken.json").exists():
        raise UnsupportedError("tekken.json is a tokenizer of another kind")
    try:
        content = read_small(path / "tokenizer.json")
    except OSError:
        content = b""  # which is no tokenizer
    known = _class(settings, config, content)
    try:
        with in_words():
            backend = Backend.from_buffer(content)
    except Exception as error:  # the library raises nothing more special
        raise UnsupportedError("there is no tokenizer.json that can be read") from error
    if settings.get("clean_up_tokenization_spaces") and not isinstance(backend.model, models.BPE):
        raise UnsupportedError("tokenizer_config.json has spaces cleaned up")

    try:
        templates = _templates(path, settings)
        special = _add_special_tokens(backend, path, settings, known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # JSON of another shape
        raise UnsupportedError("the settings of the tokenizer cannot be understood") from error
    if known is not None:
        known.parts(backend, settings)
    check_growth(backend)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    if backend.get_vocab_size() <= len(set(special.values())):
        raise UnsupportedError("tokenizer.json has no tokens of text")
    return Tokenizer(backend, special, templates)


def _read(file: Path) -> Settings:
    try:
        settings = json.loads(read_text(file)) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{file.name} cannot be read") from error
    if not isinstance(settings, dict):
        raise UnsupportedError(f"{file.name} is not a JSON object")
    return settings


def _class(settings: Settings, config: Settings, content: bytes) -> _Class | None:
    """The class that transformers' AutoTokenizer takes; None for tokenizer.json as it is."""
    model_type = config.get("model_type")
    if model_type not in _CLASS_OF_MODEL:
        raise UnsupportedError(f"models of type {model_type} may have a tokenizer class of their own")
    of_model = _CLASS_OF_MODEL[model_type]
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or of_model).removesuffix("Fast")
    if model_type == "mistral" or (model_type == "qwen2" and name != of_model):
        name = of_model  # what such models say of their class is known to be wrong
    elif name == "LlamaTokenizer" and b'"ByteLevel"' in content:
        name = ""
    if name in _AS_IT_IS:
        return None
    if name not in _CLASSES:
        raise UnsupportedError(f"the tokenizer is of class {name}")
    return _CLASSES[name]


def _add_special_tokens(backend: Backend, path: Path, settings: Settings, known: _Class | None) -> dict[str, str]:
    """Make the tokens that the settings name special ones of the backend, and return them by name."""
    in_file = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in settings:
        added = {int(i): AddedToken(**fields) for i, fields in settings["added_tokens_decoder"].items()}
    elif (path / "added_tokens.json").exists():
        raise UnsupportedError("added_tokens.json is a file of older tokenizers")
    else:
        added = in_file
        settings = {**settings, **_old_special_tokens(path / "special_tokens_map.json")}
    if known is not None and _state(added) != _state(in_file):
        raise UnsupportedError("tokenizer_config.json and tokenizer.json have other added tokens")

    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = {**(known.special_tokens if known else {}), **{n: v for n, v in settings.items() if n.endswith("_token")}}
    if isinstance(extra, dict):
        values, extra = {**values, **extra}, []
    # As add_bos_token, which counts only where tokenizer.json is not there.
    values = {name: value for name, value in values.items() if value is not None and not isinstance(value, bool)}
    by_content = {token.content: token for token in added.values()}
    names = [*(name for name in _NAMED if name in values), *(name for name in values if name not in _NAMED)]
    named = {name: _token(values[name]) for name in names}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    contents = {token.content for token in named.values()}

    tokens = [added[i] for i in sorted(added)]
    there = {token.content for token in (*in_file.values(), *tokens)}
    tokens += [token for token in (*named.values(), *map(_token, extra)) if token.content not in there]
    for token in tokens:
        token.special = token.special or token.content in contents
    backend.add_tokens(tokens)
    if known is not None and known.plain:
        backend.add_tokens(
            [AddedToken(token.content, special=True) for token in (*named.values(), *map(_token, extra))]
        )
    return {name: token.content for name, token in named.items()}


def _old_special_tokens(file: Path) -> Settings:
    """What special_tokens_map.json says, which is read where tokenizer_config.json does not list the added tokens."""
    tokens = _read(file)
    return {
        name: {**value, "__type": "AddedToken", "special": True} if isinstance(value, dict) else value
        for name, value in tokens.items()
    }


def _token(value: Any) -> AddedToken:
    """A token from JSON: its text, or all of its fields."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{name: of for name, of in value.items() if name != "__type"})
    raise UnsupportedError(f"{json.dumps(value)} is given as a special token")


def _state(tokens: dict[int, AddedToken]) -> dict[int, Any]:
    return {i: token.__getstate__() for i, token in tokens.items()}


def _templates(path: Path, settings: Settings) -> dict[str, str]:
    """Chat templates by name. Files come before the settings, which have one as text, or several with their names."""
    files: Iterable[Path] = (path / "additional_chat_templates").glob("*.jinja")
    templates = {file.name.removesuffix(".jinja"): read_text(file) for file in files}
    if (path / "chat_template.jinja").exists():
        templates["default"] = read_text(path / "chat_template.jinja")
    if templates:
        return templates
    own = settings.get("chat_template") or {}
    if isinstance(own, str):
        return {"default": own}
    return own if isinstance(own, dict) else {template["name"]: template["template"] for template in own}


def _llama(backend: Backend, settings: Settings) -> None:
    prefix = settings.get("add_prefix_space")
    prefix = prefix is None or bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy", False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if prefix else [])])
    _set_model(backend, fallback=True)


def _qwen2(backend: Backend, settings: Settings) -> None:
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _set_model(backend, fallback=False)


def _gpt2(backend: Backend, settings: Settings) -> None:
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    _set_model(backend, fallback=False)


def _gemma(backend: Backend, settings: Settings) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _set_model(backend, fallback=True)
    unknown = settings.get("unk_token", "<unk>")
    backend.model.unk_token = _token(unknown).content


def _set_model(backend: Backend, *, fallback: bool) -> None:
    """The options that the classes give their models; `fallback`: characters that are not known become bytes."""
    model = backend.model
    if not isinstance(model, models.BPE):
        raise UnsupportedError(f"the tokenizer's model is {type(model).__name__} instead of BPE")
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise UnsupportedError("the tokenizer's model marks parts of words")
    model.byte_fallback = model.fuse_unk = fallback
    model.unk_token = model.dropout = None
    model.ignore_merges = False


_END = "<|endoftext|>"
_CLASSES = {
    "LlamaTokenizer": _Class(_llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "Qwen2Tokenizer": _Class(_qwen2, dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END), plain=True),
    "GemmaTokenizer": _Class(_gemma, {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}),
    "GPT2Tokenizer": _Class(_gpt2, dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)),
}
