"""Errors as a user meets them: one sentence on standard error, or one object, and exit code 2."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import models
from tests.support.commands import SCALAR, Command
from waterfill import kernels
from waterfill.cli import console

BAD_OPTIONS: list[tuple[list[str], str]] = [
    (["plan"], r"Missing argument 'MODEL'; try waterfill plan --help"),
    (["nonsense"], r"No such command 'nonsense'; try waterfill --help"),
    (["plan", "MODEL", "--sise", "3MB"], r"No such option '?--sise'?.*; try waterfill plan --help"),
    (["plan", "MODEL"], r"exactly one of --size, --bits, --max-kl and --lossless, got none"),
    (["plan", "MODEL", "--size", "3MB", "--bits", "3"], r"exactly one of .* got --size, --bits"),
    (["plan", "MODEL", "--size", "3XB"], r"'3XB' is not a size; write bytes, or a number with kB, MB, GB"),
    (["plan", "MODEL", "--size", "-3MB"], r"'-3MB' is not a size"),
    (["plan", "MODEL", "--size", "0"], r"--size 0 is not a budget; give a positive number"),
    (["plan", "MODEL", "--bits", "many"], r"'--bits': 'many' is not a valid float; try waterfill plan --help"),
    (["plan", "MODEL", "--bits", "nan"], r"bits is nan; choose a finite number"),
    (["plan", "MODEL", "--max-kl", "-1"], r"--max-kl -1.0 is not a budget"),
    (["plan", "MODEL", "--bits", "3", "--gain", "best"], r"'best' is not one of 'auto', 'mse', 'unbiased'"),
    (["plan", "MODEL", "--bits", "3", "--probe", "text"], r"'text' is not one of 'self', 'random'"),
    (["plan", "MODEL", "--bits", "3", "--text", "missing.txt"], r"File 'missing.txt' does not exist"),
    (["plan", "MODEL", "--bits", "3", "--text", "WORK/latin.txt"], r"cannot read \S+latin\.txt as UTF-8 text"),
    (["plan", "MODEL", "--bits", "3", "--sequences", "1"], r"use at least 2 sequences of 2 tokens"),
    (["plan", "MODEL", "--bits", "3", "--revision", "main"], r"is a directory, which has no revision 'main'"),
    (["plan", "MODEL", "--bits", "3", "--keep", "nothing.*"], r"'nothing\.\*' matches no tensor .* a glob on names"),
    (["plan", "MODEL", "--bits", "3", "--tie", "q,k", "REUSE"], r"--tie 'q,k' matches no two matrices"),
    (["plan", "MODEL", "--bits", "3", "--codec", "int4", "REUSE"], r"codec 'int4' is unknown; known families are"),
    (["plan", "MODEL", "--bits", "3", "--codec", "higgs-4", "REUSE"], r"expected a name like higgs-p2-n16"),
    (["plan", "MODEL", "--bits", "3", "--codec", "higgs-p9-n9", "REUSE"], r"no grid .*n=9"),
    (["plan", "MODEL", "--bits", "1.5", "CODECS", "REUSE"], r"--bits 1\.5 .* smallest .* is 2\.\d+ .* largest 6\.\d+"),
    (["plan", "MODEL", "--size", "1MB", "CODECS", "REUSE"], r"--size 1,000,000 bytes .* smallest feasible .* largest"),
    (["plan", "MODEL", "--bits", "3", "--sensitivity", "WORK/plan.json"], r"plan\.json is not a sensitivity file"),
    (["plan", "MODEL", "--bits", "3", "CODECS", "REUSE", "--save", "/dev/null/p"], r"cannot write /dev/null/p \("),
    (["plan", "missing/of/some/kind", "--bits", "3"], r"missing/of/some/kind does not exist; give a directory"),
    (["plan", "org/missing", "--bits", "3"], r"org/missing is not a directory here and cannot be downloaded"),
    (["plan", "WORK", "--bits", "3"], r"has no config\.json"),
    (["plan", "WORK/text.py", "--bits", "3"], r"text\.py is a file; give the directory that holds it"),
    (["plan", "WORK/packed", "--bits", "3"], r"already packed by waterfill; give the checkpoint that"),
    (["pack", "MODEL", "WORK/packed", "--bits", "3"], r"packed exists already; give another output, or .*--overwrite"),
    (["pack", "MODEL", "WORK", "--bits", "3", "--overwrite"], r"is not a packed model .* is not overwritten"),
    (["pack", "MODEL", "WORK/new", "--plan", "WORK/plan.json", "--bits", "3"], r"either a plan or the options for one"),
    (["pack", "MODEL", "WORK/new", "--plan", "WORK/plan.sensitivity.json"], r"is not a plan of this version"),
    (["pack", "MODEL", "WORK/new", "--plan", "missing.json"], r"File 'missing\.json' does not exist"),
    (["pack", "OTHER", "WORK/new", "--plan", "WORK/plan.json"], r"made for other weights .*; make a new plan"),
    (["plan", "MOE", "--bits", "9", "--codec", "raw", "--sequences", "2", "--length", "8"], r"experts cannot be raw"),
    (["inspect", "missing"], r"missing is not a directory; give the directory that `waterfill pack` wrote"),
    (["inspect", "MODEL"], r"does not begin as a waterfill shard does; give a directory"),
    (["inspect", "WORK"], r"model\.safetensors cannot be read .*No such file"),
    (["eval", "WORK/packed", "--against", "MODEL"], r"there is nothing to measure; give a text, tasks or efficiency"),
    (["eval", "WORK/packed", "--against", "MODEL", "--text", "missing.txt"], r"File 'missing\.txt' does not exist"),
    (["eval", "WORK/packed", "--against", "OTHER", "--text", "WORK/text.py"], r"has no tokenizer"),
    (["eval", "WORK/packed", "--against", "MODEL", "--text", "WORK/latin.txt"], r"latin\.txt cannot be read as UTF-8"),
    (["eval", "WORK/packed", "--against", "MODEL", "--text", "WORK/text.py", "--context", "4096"], r"4096"),
    (["eval", "WORK/packed", "--against", "MODEL", "--text", "WORK/text.py", "--windows", "0"], r"0 is not in"),
    (["generate", "WORK/packed"], r"Missing option '--prompt' / '-p'; try waterfill generate --help"),
    (["generate", "WORK/packed", "-p", "x", "--temperature", "-1"], r"temperature is -1\.0; choose 0 \(greedy\)"),
    (["generate", "WORK/packed", "-p", "x", "--max-new-tokens", "0"], r"max_new_tokens is 0; choose a whole"),
    (["generate", "WORK/packed", "-p", os.fsdecode(b"caf\xe9")], r"the prompt is not valid UTF-8: its character 4 is"),
    (["generate", "MODEL", "-p", "x"], r"does not begin as a waterfill shard does"),
    (["chat", "missing"], r"missing is not a directory"),
]  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, without a tokenizer."""
    return models.tiny_llama(tmp_path_factory.mktemp("other") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_mixtral(tmp_path_factory.mktemp("moe") / "model", experts=2, layers=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"), BAD_OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_an_error_is_one_sentence(
    arguments: list[str], sentence: str, command: Command, ref_llama: Path, work: Path, other: Path, moe: Path
) -> None:
    names = {"MODEL": [str(ref_llama)], "OTHER": [str(other)], "MOE": [str(moe)], "CODECS": SCALAR}
    names["REUSE"] = ["--sensitivity", f"{work}/plan.sensitivity.json"]
    given = [part.replace("WORK", str(work)) for argument in arguments for part in names.get(argument, [argument])]
    before = sorted(work.iterdir())
    kernels.set_up()  # logs which kernels run, once per process: not part of an error
    result = command(*given)
    assert (result.code, result.out) == (2, "")
    assert re.search(sentence, result.err)
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    as_json = command(*given, "--json")
    sentence = result.err.removeprefix("error: ").removesuffix("\n")
    assert (as_json.code, as_json.record) == (2, {"error": sentence})
    assert as_json.events[-1] == {"event": "error", "message": sentence}
    assert {event["event"] for event in as_json.events[:-1]} <= {"progress"}
    assert sorted(work.iterdir()) == before, "nothing is left behind"


@pytest.fixture
def damaged(work: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be spoiled."""
    return Path(shutil.copytree(work / "packed", tmp_path / "damaged"))


@pytest.mark.parametrize("name", ["inspect", "generate"])
def test_damage_is_named(name: str, command: Command, damaged: Path) -> None:
    more = ["-p", "x"] if name == "generate" else []
    shard = damaged / "model.safetensors"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 4
    shard.write_bytes(flipped)
    assert "buffer 'model.layers.5.mlp.down_proj.codes' does not match its digest" in command(name, damaged, *more).err
    shard.write_bytes(whole[:-1])
    result = command(name, damaged, *more)
    assert result.code == 2
    assert re.fullmatch(r"error: \S+model\.safetensors is refused: [^\n]+\n", result.err)
    shard.write_bytes(whole)
    (damaged / "config.json").write_text("{}")
    assert re.search(r"config\.json is refused: [^\n]+\n", command(name, damaged, *more).err)
    (damaged / "waterfill.json").unlink()
    assert re.search(r"waterfill\.json is refused: it is missing; [^\n]+\n", command(name, damaged, *more).err)


@pytest.mark.parametrize("strict", [True, False])  # what Python makes of such bytes depends on the locale
def test_conversations_that_are_not_utf8(
    strict: bool, command: Command, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors="strict" if strict else "surrogateescape")
    monkeypatch.setattr(sys, "stdin", typed)
    result = command("chat", work / "packed")
    assert (result.code, result.out) == (2, "")
    expected = "standard input is not UTF-8 text" if strict else "the prompt is not valid UTF-8"
    assert re.fullmatch(rf"error: {expected}[^\n]+\n", result.err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_that_an_encoding_lacks_are_shown_as_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    console.show_everything()
    for stream in streams.values():
        stream.write("a 日本 🙂 \udcff")
        stream.flush()
        written = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert written.startswith(b"a ")
        assert written.endswith(b"\\udcff")
        assert ("日".encode() if encoding == "utf-8" else b"\\u65e5") in written
