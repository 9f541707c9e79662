"""Artifacts that lie: what the fuzzer changes, and the seals that make every other check pass.

sound artifact ──read──► Draft ──changes──► headers, buffers, small files ──seal──► a directory whose digests are right
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.artifact_drafts import Draft, Json, Tensor, read
from waterfill.base.dtypes import ITEM_BYTES
from waterfill.files.artifact.manifest import INDEX, MANIFEST

INTEGERS = (0, 1, 2, 3, 4, 7, 63, 65, 1024, 4097, 65536, 1 << 20, 1 << 24, 1 << 31, 1 << 40, (1 << 63) - 1)
VALUES = (None, True, -1, 0, 1, 3, 0.5, 1e300, 1 << 31, 1 << 70, "", "x", "é" * 9, [], [1], [[]], {}, {"a": 1})
CODECS = (
    *("raw", "lossless", "levels-8", "levels-16", "demo", "higgs", "higgs-p1-n16", "higgs-p1-n17", "higgs-p2-n16"),
    *("higgs-p4-n4096", "higgs-p3-n8", "higgs-p9-n9", "trellis-s8-r2.0000", "trellis-s256-r9.0000"),
    *("trellis-s64-r0.3000", "trellis-s3-r2.0000", "trellis-s8-r9.9999"),
)
DTYPES = (*ITEM_BYTES, "F64", "")
WORDS = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\0\0\0\x80",
    b"\x01\0\0\0",
    b"\0\x7c\0\x7c",
    b"\0\xfe\0\xfe",
    b"\x04\0\0\0",
)
SPECIAL = ("pipe", "zero", "folder", "dangling", "loop", "sparse", "absent")
MISSPELT = ("quaftization_config", "quantization", "Quantization_config")


class Mutator:
    """Drafts without end from sound artifacts; case `number` of a seed is always the same."""

    def __init__(self, artifacts: dict[str, Path], seed: int) -> None:
        self._artifacts, self._seed = artifacts, seed
        self._chance = random.Random()

    def case(self, number: int) -> tuple[str, Draft]:
        """(what was changed, the draft)."""
        self._chance = random.Random(f"{self._seed} {number}")
        name = self._chance.choice(sorted(self._artifacts))
        draft, said = read(self._artifacts[name]), [name]
        for _ in range(self._chance.choice((1, 1, 1, 2, 3))):
            change = self._chance.choice(self.changes)
            said.append(change.__name__)
            change(self, draft)
        return " ".join(said), draft

    # What tensors are

    def _any(self, draft: Draft) -> tuple[dict[str, Tensor], str]:
        return self._chance.choice(draft.tensors())

    def shape(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        sizes = shard[name].record["shape"]
        if self._chance.random() < 0.2 or not sizes:
            sizes[:] = self._chance.choice(([], [1], [64], [0, 0], [1, 1, 1], sizes[::-1], [*sizes, 1]))
        else:
            sizes[self._chance.randrange(len(sizes))] = self._number(self._chance.choice(sizes))

    def everywhere(self, draft: Draft) -> None:
        """One size of the model, in all records and in config.json, as if it were so."""
        config = _config(draft)
        names = [key for key, value in config.items() if type(value) is int and value > 15]
        if not names:
            return
        key = self._chance.choice(names)
        old, config[key] = config[key], self._number(config[key])
        draft.files["config.json"] = json.dumps(config).encode()
        for shard, name in draft.tensors():
            record = shard[name].record
            record["shape"] = [config[key] if size == old else size for size in record["shape"]]

    def codec(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        shard[name].record["codec"] = self._chance.choice(CODECS)

    def dtype(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        shard[name].record["dtype"] = self._chance.choice(DTYPES)

    def numbers(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        key = self._chance.choice(("exponent", "t2"))
        shard[name].record["params"][key] = self._chance.choice((-9999, -200, -127, 127, 200, 9999, 0.5, *VALUES))

    def omit(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        if len(shard) > 1:
            del shard[name]

    def rename(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        others = [other for _, other in draft.tensors()]
        new = self._chance.choice((*others, f"{name}.0", name.upper(), "lm_head", "model", "", "x" * 999, name[::-1]))
        shard[new] = shard.pop(name)
        if shard[new].record["codec"] == "raw" and "" in shard[new].buffers:
            shard[new].buffers = dict(shard[new].buffers)

    def swap(self, draft: Draft) -> None:
        """Two tensors take each other's places."""
        (one, first), (other, second) = self._any(draft), self._any(draft)
        one[first], other[second] = other[second], one[first]

    def keys(self, draft: Draft) -> None:
        shard, name = self._any(draft)
        key = self._chance.choice(list(shard[name].buffers))
        new = self._chance.choice(("scales", "codes", "streams", "weight", "", "bias", "a.b"))
        shard[name].buffers = {(new if k == key else k): v for k, v in shard[name].buffers.items()}

    # What buffers hold

    def _change(self, draft: Draft, of: Callable[[bytes], bytes]) -> None:
        """Bytes of one buffer; its shape follows their number, where that is whole."""
        shard, name = self._any(draft)
        key = self._chance.choice(list(shard[name].buffers))
        dtype, shape, data = shard[name].buffers[key]
        changed = of(data)
        if len(changed) != len(data):
            shape = [len(changed) // ITEM_BYTES[dtype]]
        shard[name].buffers[key] = (dtype, shape, changed)

    def flip(self, draft: Draft) -> None:
        def of(data: bytes) -> bytes:
            changed = bytearray(data)
            for _ in range(self._chance.randrange(1, 9) if data else 0):
                changed[self._place(data)] ^= 1 << self._chance.randrange(8)
            return bytes(changed)

        self._change(draft, of)

    def word(self, draft: Draft) -> None:
        """A number of four bytes, at the beginning more often than elsewhere: an index, a head, two scales."""

        def of(data: bytes) -> bytes:
            at = self._place(data) // 4 * 4
            return data[:at] + self._chance.choice(WORDS)[: len(data) - at] + data[at + 4 :]

        self._change(draft, of)

    def noise(self, draft: Draft) -> None:
        self._change(draft, lambda data: self._chance.randbytes(len(data)))

    def fill(self, draft: Draft) -> None:
        self._change(draft, lambda data: bytes([self._chance.choice((0, 0xFF, 0x7C, 0x80))]) * len(data))

    def resize(self, draft: Draft) -> None:
        def of(data: bytes) -> bytes:
            if self._chance.random() < 0.5:
                return data[: self._chance.randrange(len(data) + 1)]
            return data + self._chance.choice((bytes(2), data, self._chance.randbytes(64)))

        self._change(draft, of)

    # What headers say

    def entry(self, draft: Draft) -> None:
        """One field of one entry or record, changed once they are made."""
        pick, value, field_ = self._chance.random(), self._chance.choice(VALUES), self._chance.random()

        def change(records: Json, entries: Json) -> None:
            where = records if field_ < 0.5 else entries
            fields = where[sorted(where)[int(pick * len(where))]]
            if isinstance(fields, dict):
                fields[sorted(fields)[int(field_ * 2 % 1 * len(fields))]] = value

        draft.late.append(change)

    def offsets(self, draft: Draft) -> None:
        pick, by = self._chance.random(), self._chance.choice((-2, -1, 1, 2, 64, 1 << 40))

        def change(_: Json, entries: Json) -> None:
            entry = entries[sorted(entries)[int(pick * len(entries))]]
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = [start + by * (by % 2), stop + by]

        draft.late.append(change)

    def unguarded(self, draft: Draft) -> None:
        draft.guarded = False

    # What small files say

    def config(self, draft: Draft) -> None:
        self._leaf(draft, "config.json")

    def settings(self, draft: Draft) -> None:
        names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
        self._leaf(draft, self._chance.choice(names))

    def switches(self, draft: Draft) -> None:
        """What config.json may try to say of the loading itself."""
        config = _config(draft)
        key = self._chance.choice(("verified", "streamed", "format_version", "quant_method", "dequantize"))
        config["quantization_config"] = {"quant_method": "waterfill", key: self._chance.choice((True, *VALUES))}
        draft.files["config.json"] = json.dumps(config).encode()

    def misspelt(self, draft: Draft) -> None:
        new = self._chance.choice(MISSPELT).encode()
        draft.files["config.json"] = draft.files["config.json"].replace(b"quantization_config", new)

    def model_type(self, draft: Draft) -> None:
        config = _config(draft)
        config["model_type"] = self._chance.choice(("llama", "mistral", "qwen2", "qwen3", "gpt2", "t5", "nothing"))
        draft.files["config.json"] = json.dumps(config).encode()

    def text(self, draft: Draft) -> None:
        name = self._chance.choice(sorted(draft.files))
        content = draft.files[name]
        deep = b"[" * 200_000
        other = (b"", b"{}", b"[]", b"null", b"\xff\xfe", deep, content[: len(content) // 2], content * 2, bytes(99))
        draft.files[name] = self._chance.choice(other)

    def special(self, draft: Draft) -> None:
        names = (*draft.files, *draft.shards, MANIFEST, INDEX, "added_tokens.json", "special_tokens_map.json")
        draft.special[self._chance.choice(names)] = self._chance.choice(SPECIAL)

    def truncated(self, draft: Draft) -> None:
        """A file that ends early or goes on, with nothing to hide it."""
        pick, share = self._chance.random(), self._chance.choice((1.0, self._chance.random()))
        more = self._chance.choice((b"", b"\0", b"x" * 99))
        draft.cut.append((pick, lambda content: content[: int(share * len(content))] + more))

    def _leaf(self, draft: Draft, name: str) -> None:
        """Some value anywhere in a JSON file."""
        try:
            tree = json.loads(draft.files[name])
        except (ValueError, RecursionError):
            return
        places = list(_places(tree))
        if not places:
            return
        parent, key = self._chance.choice(places)
        if self._chance.random() < 0.1 and isinstance(parent, dict):
            del parent[key]
        elif type(parent[key]) is int and self._chance.random() < 0.5:
            parent[key] = self._number(parent[key])
        else:
            parent[key] = self._chance.choice(VALUES)
        draft.files[name] = json.dumps(tree).encode()

    # Chance

    def _number(self, near: int) -> int:
        return self._chance.choice((*INTEGERS, near - 1, near + 1, 2 * near, near // 2, -near))

    def _place(self, data: bytes | bytearray) -> int:
        return min(self._chance.choice((0, 4, 8, self._chance.randrange(max(1, len(data))))), max(0, len(data) - 1))

    changes: Sequence[Callable[[Mutator, Draft], None]] = (
        *(shape, everywhere, everywhere, codec, dtype, numbers, omit, rename, swap, keys),
        *(flip, word, word, noise, fill, resize, entry, entry, offsets, unguarded),
        *(config, config, config, settings, switches, misspelt, model_type, text, special, truncated),
    )


def _config(draft: Draft) -> Json:
    """config.json, or nothing where it has been spoilt already."""
    try:
        found = json.loads(draft.files["config.json"])
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(parent, key) of every value in a JSON tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        for key in list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ():
            found.append((parent, key))
            waiting.append(parent[key])
    return found
