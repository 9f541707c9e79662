"""Hostile shards: name → (the file's bytes, what the refusal must say). Each is sound but for one thing."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

PREFIX = rb'{"__metadata__":{"format":"pt","waterfill":"{\"digest\":\"'
DATA = bytes(range(16))

ENTRIES: Json = {
    "norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "proj.scales": {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]},
    "proj.codes": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]},
}

GUARD: Json = {"dtype": "U8", "shape": [0], "data_offsets": [16, 16]}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


RECORDS: Json = {
    "norm.weight": {
        "codec": "raw",
        "shape": [2],
        "dtype": "F32",
        "params": {"exponent": 0, "t2": 0.0},
        "digests": {"": _digest(DATA[:8])},
    },
    "proj": {
        "codec": "demo",
        "shape": [2, 4],
        "dtype": "BF16",
        "params": {"exponent": 0, "t2": 0.1},
        "digests": {"scales": _digest(DATA[8:12]), "codes": _digest(DATA[12:])},
    },
}


def seal(text: bytes, data: bytes = DATA) -> bytes:
    """A shard around a header's text, which must begin with PREFIX and 16 digits: padded, and given its own digest."""
    text += b" " * (-len(text) % 8)
    start = 8 + len(PREFIX)
    head = struct.pack("<Q", len(text)) + text
    blank = head[:start] + b"0" * 16 + head[start + 16 :]
    return blank[:start] + _digest(blank).encode() + blank[start + 16 :] + data


def header(metadata: str, entries: str) -> bytes:
    """Header text from the two JSON texts, neither of which need be sound."""
    return f'{{"__metadata__":{{"format":"pt","waterfill":{json.dumps(metadata)}}}{entries}}}'.encode()


def metadata_text(records: object, **fields: object) -> str:
    return json.dumps({"digest": "0" * 16, "version": 1, "tensors": records, **fields}, separators=(",", ":"))


def shard(
    change: Callable[[Json, Json], object] = lambda records, entries: None, data: bytes = DATA, **fields: object
) -> bytes:
    """A sealed shard after `change(records, entries)`, which is sound when nothing is changed."""
    records, entries = copy.deepcopy(RECORDS), copy.deepcopy(ENTRIES)
    change(records, entries)
    return seal(header(metadata_text(records, **fields), "," + json.dumps(entries)[1:-1]), data)


def entry(name: str = "proj.codes", **fields: object) -> bytes:
    """A shard with other fields in one entry."""
    return shard(lambda records, entries: entries[name].update(fields))


def record(name: str = "proj", **fields: object) -> bytes:
    """A shard with other fields in one record."""
    return shard(lambda records, entries: records[name].update(fields))


def params(text: str) -> bytes:
    """A shard with `text` as the params of `proj`, as it stands."""
    metadata = metadata_text(RECORDS).replace('{"exponent":0,"t2":0.1}', text)
    return seal(header(metadata, "," + json.dumps(ENTRIES)[1:-1]))


def sound_text() -> tuple[str, str]:
    return metadata_text(RECORDS), "," + json.dumps(ENTRIES)[1:-1]


def rename(records: Json, entries: Json, name: str) -> None:
    """Call the raw tensor `name`, first in both maps."""
    for mapping in (records, entries):
        items = [(name, mapping.pop("norm.weight")), *mapping.items()]
        mapping.clear()
        mapping.update(items)


def reverse(mapping: Json) -> None:
    items = list(mapping.items())[::-1]
    mapping.clear()
    mapping.update(items)


def claimed_length(length: int) -> bytes:
    return struct.pack("<Q", length) + shard()[8:]


def guard(name: str = "proj.weight", data: bytes = DATA, **fields: object) -> bytes:
    """A shard with one more entry, which is sound as a guard when nothing is given."""
    return shard(lambda records, entries: entries.update({name: {**GUARD, **fields}}), data)


def coded(**fields: object) -> bytes:
    """A shard whose matrix is coded as it says when nothing is given: [2, 2] numbers by a codec that is known."""
    return record(**{"codec": "higgs-p1-n256", "shape": [2, 2], **fields})


SOUND = shard()
_METADATA, _ENTRIES = sound_text()
_OTHER_KEY = {"digests": {"scales": "0" * 16, "weight": "0" * 16}}
_LARGE = 2**62

ATTACKS: dict[str, tuple[bytes, str]] = {
    # the length
    "empty": (b"", "has only 0 bytes"),
    "seven_bytes": (SOUND[:7], "has only 7 bytes"),
    "length_of_2_to_the_64": (claimed_length(2**64 - 8), "header claims 18446744073709551608 bytes"),
    "length_of_a_terabyte": (claimed_length(2**40), "header claims"),
    "length_at_the_limit": (claimed_length(1 << 24), "header claims 16777216 bytes"),
    "length_of_the_file": (claimed_length(len(SOUND)), "header claims"),
    "length_of_nothing": (claimed_length(0), "header claims 0 bytes"),
    "length_not_a_multiple_of_8": (claimed_length(len(SOUND) - 8 - 17), "header claims"),
    "length_of_half_the_header": (claimed_length(320), "does not match the header's digest"),
    # the text
    "plain_safetensors": (
        struct.pack("<Q", 160) + b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(160),
        "does not begin",
    ),
    "pickle": (b"\x80\x04\x95" + bytes(200), "header claims"),
    "digest_of_zeros": (SOUND[: 8 + len(PREFIX)] + b"0" * 16 + SOUND[8 + len(PREFIX) + 16 :], "header's digest"),
    "digest_not_ascii": (SOUND[: 8 + len(PREFIX)] + b"\xff" * 16 + SOUND[8 + len(PREFIX) + 16 :], "header's digest"),
    "padded_with_nul": (seal(header(_METADATA, _ENTRIES) + b"\0" * 8), "not padded with spaces"),
    "text_after_the_object": (seal(header(_METADATA, _ENTRIES) + b"{}"), "does not parse"),
    "text_cut_off": (seal(header(_METADATA, _ENTRIES)[:-20] + b"}"), "does not parse"),
    "not_ascii": (seal(header(_METADATA, _ENTRIES).replace(b"norm", "nörm".encode())), "does not parse"),
    "deep_header": (seal(header(_METADATA, ',"a":' + "[" * 100_000 + "]" * 100_000)), "nested too deeply"),
    "deep_objects": (seal(header(_METADATA, ',"a":' + '{"a":' * 50_000 + "0" + "}" * 50_000)), "nested too deeply"),
    "deep_metadata": (
        seal(header(_METADATA[:-1] + ',"a":' + "[" * 100_000 + "]" * 100_000 + "}", _ENTRIES)),
        "nested too deeply",
    ),
    "entry_twice": (seal(header(_METADATA, _ENTRIES + "," + json.dumps(ENTRIES)[1:-1])), "occurs twice"),
    "metadata_twice": (seal(header(_METADATA, _ENTRIES + ',"__metadata__":{}')), "occurs twice"),
    "field_twice": (
        seal(header(_METADATA, _ENTRIES.replace('"shape": [4]', '"shape": [4], "shape": [4]'))),
        "occurs twice",
    ),
    "record_twice": (seal(header(_METADATA.replace('"proj":', '"norm.weight":'), _ENTRIES)), "occurs twice"),
    "endless_integer": (params('{"exponent":' + "9" * 100_000 + ',"t2":0}'), "number of 100000 characters"),
    "endless_float": (params('{"exponent":0,"t2":0.' + "1" * 100_000 + "}"), "has the number 0.111"),
    "nan": (params('{"exponent":0,"t2":NaN}'), "has the number NaN"),
    "infinity": (params('{"exponent":0,"t2":-Infinity}'), "has the number -Infinity"),
    "overflowing_float": (params('{"exponent":0,"t2":1e999}'), "has the number 1e999"),
    # the metadata
    "metadata_with_another_key": (
        seal(header(_METADATA, _ENTRIES).replace(b'"},"norm', b'","x":"y"},"norm')),
        "its metadata does not have exactly",
    ),
    "metadata_not_an_object": (seal(PREFIX + b"0" * 16 + b'\\"}"}, "a": 1}'), "does not have exactly|version None"),
    "metadata_missing": (seal(PREFIX + b"0" * 16 + b'"}}'), "does not parse"),
    "metadata_digest_too_long": (shard(digest="0" * 17), "digest of more than 16 digits"),
    "version_2": (shard(version=2), "version 2 and this waterfill reads version 1; upgrade"),
    "version_true": (shard(version=True), "version True"),
    "version_1_0": (shard(version=1.0), "version 1.0"),
    "version_large": (shard(version=10**30), "format version 1000"),
    "unknown_metadata_field": (shard(code="import os"), "its metadata does not have exactly"),
    "tensors_a_list": (shard(tensors=[]), "lists no tensors"),
    "tensors_empty": (shard(tensors={}), "'norm.weight' is stored but not described"),
    "no_tensors_at_all": (seal(header(metadata_text({}), ""), b""), "do not end where the file ends"),
    # the records
    "record_not_an_object": (
        shard(lambda records, entries: records.update(proj=[])),
        "tensor 'proj' does not have exactly",
    ),
    "record_with_another_field": (record(offset=0), "tensor 'proj' does not have exactly"),
    "record_without_entry": (
        shard(lambda records, entries: entries.pop("proj.codes")),
        "'proj.codes' is described where 'nothing'",
    ),
    "entry_without_record": (
        shard(lambda records, entries: records.pop("proj")),
        "'proj.scales' is stored but not described",
    ),
    "records_in_another_order": (
        shard(lambda records, entries: reverse(records)),
        "'proj.scales' is described where 'norm.weight'",
    ),
    "codec_empty": (record(codec=""), "tensor 'proj' has a name or codec"),
    "codec_a_number": (record(codec=1), "tensor 'proj' has a field that is not a string"),
    "codec_raw_with_two_buffers": (record(codec="raw"), "raw tensor 'proj' is not exactly one buffer"),
    "raw_of_another_codec": (record("norm.weight", codec="demo"), "'norm.weight' of a packed tensor ends in ''"),
    "raw_of_another_shape": (record("norm.weight", shape=[1, 2]), "raw tensor 'norm.weight' is not exactly"),
    "raw_of_another_dtype": (record("norm.weight", dtype="BF16"), "raw tensor 'norm.weight' is not exactly"),
    "dtype_unknown": (record(dtype="F8_E4M3"), "tensor 'proj' has dtype 'F8_E4M3'"),
    "shape_negative": (record(shape=[-2, -4]), "a dimension of tensor 'proj' is -2"),
    "shape_of_floats": (record(shape=[2.0, 4.0]), "a dimension of tensor 'proj' is 2.0"),
    "shape_of_bools": (record(shape=[True, 4]), "a dimension of tensor 'proj' is True"),
    "shape_a_string": (record(shape="24"), "tensor 'proj' has no shape"),
    "shape_of_many_dimensions": (record(shape=[1] * 100_000), "tensor 'proj' has no shape of at most 8"),
    "exponent_too_large": (params('{"exponent":10000,"t2":0}'), "tensor 'proj': its exponent is 10000"),
    "exponent_a_float": (params('{"exponent":0.5,"t2":0}'), "its exponent is 0.5"),
    "exponent_a_bool": (params('{"exponent":true,"t2":0}'), "its exponent is True"),
    "t2_negative": (params('{"exponent":0,"t2":-0.5}'), "its t2 is -0.5"),
    "t2_too_large": (params('{"exponent":0,"t2":1e6}'), "its t2 is 1000000.0"),
    "t2_a_string": (params('{"exponent":0,"t2":"0"}'), "a t2 that is not a number"),
    "t2_missing": (params('{"exponent":0}'), "tensor 'proj' does not have exactly"),
    "params_a_list": (params("[0,0]"), "tensor 'proj' does not have exactly"),
    "digests_a_list": (record(digests=["0" * 16]), "tensor 'proj' has no digests"),
    "digests_too_short": (record(digests={"scales": "0", "codes": "0"}), "tensor 'proj' has no digests"),
    "digests_in_capitals": (record(digests={"scales": "A" * 16, "codes": "A" * 16}), "tensor 'proj' has no digests"),
    "digests_empty": (
        shard(lambda records, entries: records.update(x={**records["proj"], "digests": {}})),
        "tensor 'x' has no buffer",
    ),
    "digests_of_other_buffers": (
        record(digests={"scales": "0" * 16, "indices": "0" * 16}),
        "'proj.indices' is described where 'proj.codes'",
    ),
    # the names
    "name_empty": (shard(lambda records, entries: rename(records, entries, "")), "tensor '' has a name or codec"),
    "name_not_ascii": (
        shard(lambda records, entries: rename(records, entries, "nörm")),
        "does not parse|printable ASCII",
    ),
    "name_half_a_surrogate": (shard(lambda records, entries: rename(records, entries, "\ud800")), "printable ASCII"),
    "name_with_a_line_break": (shard(lambda records, entries: rename(records, entries, "a\nb")), "printable ASCII"),
    "name_with_nul": (shard(lambda records, entries: rename(records, entries, "a\0")), "printable ASCII"),
    "name_without_end": (
        shard(lambda records, entries: rename(records, entries, "a" * 100_000)),
        "1 to 1000 printable",
    ),
    "codes_called_weight": (
        shard(lambda r, e: (r["proj"].update(_OTHER_KEY), e.update({"proj.weight": e.pop("proj.codes")}))),
        "'proj.weight' of a packed tensor ends in 'weight'",
    ),
    "key_with_a_dot": (
        shard(
            lambda r, e: (
                r["proj"].update(digests={"scales": "0" * 16, "a.weight": "0" * 16}),
                e.update({"proj.a.weight": e.pop("proj.codes")}),
            )
        ),
        "'proj.a.weight' of a packed tensor ends in 'a.weight'",
    ),
    # the entries
    "entry_not_an_object": (
        shard(lambda records, entries: entries.update({"proj.codes": 1})),
        "buffer 'proj.codes' does not have exactly",
    ),
    "entry_with_another_field": (entry(strides=[1]), "buffer 'proj.codes' does not have exactly"),
    "entry_dtype_unknown": (entry(dtype="F4"), "buffer 'proj.codes' has dtype 'F4'"),
    "entry_dtype_a_list": (entry(dtype=["U8"]), "buffer 'proj.codes' has a field that is not a string"),
    "entry_shape_too_large": (entry(shape=[_LARGE, _LARGE, _LARGE]), "'proj.codes' has offsets"),
    "entry_shape_overflowing_to_fit": (entry(shape=[2**32, 2**32]), "'proj.codes' has offsets"),
    "entry_shape_beyond_63_bits": (entry(shape=[2**63]), "a dimension of buffer 'proj.codes'"),
    "entry_shape_negative": (entry(shape=[-2, -2]), "a dimension of buffer 'proj.codes' is -2"),
    "entry_shape_does_not_match": (entry(shape=[3]), "'proj.codes' has offsets"),
    "entry_of_odd_length": (
        shard(lambda r, e: e["proj.codes"].update(shape=[3], data_offsets=[12, 15]), DATA[:15]),
        "'proj.codes' has 3 bytes, which is odd",
    ),
    "entry_misaligned": (
        shard(
            lambda r, e: (
                e["norm.weight"].update(dtype="F16", shape=[1], data_offsets=[0, 2]),
                r["norm.weight"].update(dtype="F16", shape=[1]),
                e["proj.scales"].update(dtype="F32", shape=[1], data_offsets=[2, 6]),
            ),
            DATA[:6],
        ),
        "'proj.scales' begins at 2, which is not a multiple",
    ),
    "offsets_negative": (entry(data_offsets=[-4, 0]), "'proj.codes' has offsets"),
    "offsets_overlapping": (entry(data_offsets=[8, 12]), "'proj.codes' has offsets"),
    "offsets_with_a_hole": (entry(data_offsets=[14, 18]), "'proj.codes' has offsets"),
    "offsets_backwards": (entry(data_offsets=[16, 12]), "'proj.codes' has offsets"),
    "offsets_beyond_the_end": (entry(shape=[_LARGE], data_offsets=[12, 12 + _LARGE]), "do not end where the file ends"),
    "offsets_floats": (entry(data_offsets=[12.0, 16.0]), "offsets that are not two integers"),
    "offsets_bools": (entry("norm.weight", data_offsets=[False, 8]), "offsets that are not two integers"),
    "offsets_three": (entry(data_offsets=[12, 16, 16]), "offsets that are not two integers"),
    "offsets_an_object": (entry(data_offsets={"0": 12, "1": 16}), "offsets that are not two integers"),
    # the guard
    "guard_of_another_name": (guard("norm.weights"), "'norm.weights' is stored but not described"),
    "guard_with_bytes": (guard(shape=[2], data_offsets=[16, 18], data=DATA + b"xx"), "'proj.weight' is stored but not"),
    "guard_elsewhere": (guard(data_offsets=[0, 0]), "'proj.weight' is stored but not described"),
    "guard_of_a_parameter's_shape": (guard(shape=[2, 0]), "'proj.weight' is stored but not described"),
    "guard_before_the_buffers": (
        shard(lambda r, e: (e.update({"proj.weight": GUARD}), reverse(e))),
        "'norm.weight' is described where 'proj.weight'",
    ),
    # what codecs make of a tensor
    "codec_with_a_larger_matrix": (coded(shape=[8, 4]), "cannot be coded by 'higgs-p1-n256' as F16"),
    "codec_with_a_wider_matrix": (coded(shape=[2, 8]), "cannot be coded"),
    "codec_with_a_smaller_matrix": (coded(shape=[1, 4]), "cannot be coded"),
    "codec_with_no_rows": (coded(shape=[0, 4]), "cannot be coded"),
    "codec_with_a_vector": (coded(shape=[4]), "cannot be coded"),
    "codec_with_a_matrix_without_end": (coded(shape=[_LARGE, _LARGE]), "cannot be coded"),
    "codec_with_a_row_without_end": (coded(shape=[1, _LARGE]), "cannot be coded"),
    "codec_of_other_buffers": (coded(codec="trellis-s8-r3.0000"), "cannot be coded by 'trellis-s8-r3.0000'"),
    "codec_of_integers": (coded(dtype="I32"), "is coded and has dtype I32"),
    "codec_with_a_huge_exponent": (coded(params={"exponent": 1024, "t2": 0.0}), "has exponent 1024"),
    "lossless_without_end": (coded(codec="lossless", shape=[_LARGE]), "cannot be coded by 'lossless'"),
    # the data
    "data_missing": (shard(data=b""), "do not end where the file ends"),
    "data_one_byte_short": (shard(data=DATA[:-1]), "do not end where the file ends"),
    "data_with_something_behind": (shard(data=DATA + b"MZ"), "do not end where the file ends"),
}
