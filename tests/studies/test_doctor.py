"""`waterfill doctor` through the command line: what it finds, and what it makes of machines and installations."""

from __future__ import annotations

import _ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support.commands import Command
from tests.support.documented import documented, shape
from tests.support.kernel_samples import ISAS, NOT_BUILT, needs_native, nothing_decided, one_thread
from waterfill import kernels
from waterfill.base import machine, native, native_signatures
from waterfill.base.errors import UnsupportedError
from waterfill.kernels.layer import DecoderLayer
from waterfill.running.engine.cache import Sequence
from waterfill.running.hf import fused, install
from waterfill.studies.diagnosis import doctor, trial

WAYS = ("transformers", "native layers", "engine")
EXTRAS = {"bench", "compare", "eval", "gguf", "grids", "plot", "tune"}


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in (native.ISA_VARIABLE, native.FLOAT_ACTIVATIONS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(doctor, "READ_S", 0.01)
    with one_thread(), nothing_decided():
        yield


def line(text: str, subject: str) -> str:
    found = re.search(rf"^{subject}  +(.+?) *$", text, flags=re.MULTILINE)
    assert found, f"no line {subject!r} in {text}"
    return found[1]


@needs_native
def test_the_record_is_the_documented_one(command: Command) -> None:
    result = command("doctor", "--json")
    record = result.record
    assert (result.code, result.err) == (0, "")
    expected = documented("doctor")
    assert set(record["extras"]) == set(expected.pop("extras")) == EXTRAS
    assert shape({**record, "extras": 0}) == shape({**expected, "extras": 0})
    assert record["waterfill"] == waterfill.__version__
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["library"] == str(native.find())
    assert [name for name, usable in record["instruction_sets"].items() if usable] == ISAS
    assert {"avx2", "neon", "scalar"} < set(record["instruction_sets"]), "those of other machines too"
    assert (record["multiplies"], record["activations"]) == (ISAS[0], "integer")
    assert (record["healthy"], record["error"], record["problem"]) == (True, None, None)
    assert record["ways"] == dict.fromkeys(WAYS, "right")
    assert 1e8 < record["read_bytes_per_s"] < 1e13
    assert 1e8 < record["memory_bytes"] < 1e14


@needs_native
def test_the_table_says_the_same(command: Command) -> None:
    text = command("doctor").out
    assert line(text, "waterfill").startswith(f"{waterfill.__version__}, Python 3.")
    assert re.fullmatch(r".+, \d+ cores?, \d+ threads? in use", line(text, "machine"))
    assert re.fullmatch(r"[\d.]+ [MG]B, read at [\d.]+ GB/s", line(text, "memory"))
    assert line(text, "library") == str(native.find())
    assert line(text, "instruction sets").startswith(", ".join(ISAS) + "; not here: ")
    assert line(text, "multiplied by") == f"{ISAS[0]}: the best that this build and this machine share"
    assert line(text, "activations") == "as integers"
    assert line(text, "tokens made by") == ", ".join(WAYS)
    assert line(text, "self-check") == "passed"


@pytest.mark.parametrize("isa", [*ISAS, "none"])
@pytest.mark.parametrize("activations", ["integer", "float"])
def test_what_the_environment_chooses(
    isa: str, activations: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    monkeypatch.setenv(native.FLOAT_ACTIVATIONS, activations)
    result = command("doctor", "--json")
    record = result.record
    assert (result.code, record["healthy"]) == (0, True), "slow is not wrong"
    assert record["multiplies"] == ("stored" if isa == "none" else isa)
    assert record["why"] == f"WATERFILL_ISA is {isa}"
    assert record["activations"] == ("float" if isa == "none" else activations)
    off = {isa: f"WATERFILL_ISA is {isa}", activations: f"WATERFILL_ACTIVATIONS is {activations}"}
    how = off["none"] if "none" in off else off.get("float", "right")
    assert record["ways"] == {"transformers": "right", "native layers": how, "engine": how}


def test_an_instruction_set_that_is_not_there_is_the_finding(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "avx1024")
    result = command("doctor", "--json")
    record = result.record
    assert (result.code, record["healthy"], record["multiplies"]) == (1, False, None)
    assert re.match("WATERFILL_ISA is 'avx1024', .* choose one of .*none$", record["error"])
    table = command("doctor")
    assert table.code == 1
    assert line(table.out, "multiplied by") == "nobody"
    assert line(table.out, "self-check") == f"failed: {record['error']}"


@pytest.mark.parametrize("damage", ["missing", "text", "of another kind", "of another version"])
def test_why_there_is_no_library(
    damage: str, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text_file = tmp_path / "libwaterfill_native.so"
    text_file.write_text("not a library")
    file: Path | None = text_file
    reason = "invalid ELF header|file too short|not a mach-o|not a valid"
    if damage == "missing":
        file, reason = None, r"it was not built; install waterfill again where there are CMake and a C\+\+ compiler"
    elif damage == "of another kind":
        file, reason = Path(_ctypes.__file__), "has no version, this waterfill needs"
    elif damage == "of another version":
        if not ISAS:
            pytest.skip(NOT_BUILT)
        monkeypatch.setattr(native_signatures, "HEADER", "99")
        file, reason = native.find(), r"this waterfill needs 99; install waterfill again"
    monkeypatch.setattr(native, "find", lambda: file)
    monkeypatch.setattr(doctor, "_try_ways", lambda ways: None)  # takes seconds without the library
    result = command("doctor", "--json")
    record = result.record
    assert (result.code, record["healthy"]) == (0, True), "the reference is right"
    assert (record["multiplies"], record["instruction_sets"]) == ("stored", {})
    assert record["library"] == (None if file is None else str(file))
    assert re.search(reason, record["problem"])
    text = " ".join(command("doctor").out.split())
    assert record["problem"] in text
    assert "the torch reference, which is slow: the native library cannot be used" in text


def wrong_in_one_bit(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[-1, -1] = torch.nextafter(y[-1, -1], torch.tensor(torch.inf))
    return y


@pytest.mark.parametrize(
    ("isa", "spoil", "error"),
    [
        ("", wrong_in_one_bit, r"a product of 1 tokens with higgs-p2-n16 differs from the reference in some bits"),
        ("", lambda y: y if len(y) == 1 else y.roll(1, 0), r"a product of 20 tokens with higgs-p2-n16 is wrong"),
        ("none", lambda y: 1.05 * y, r"a product of 1 tokens with higgs-p2-n16 is wrong"),
        ("none", lambda y: y * float("nan"), r"a product of 1 tokens with higgs-p2-n16 is wrong"),
        ("", lambda y: y[:, :-1], r"RuntimeError: The size of tensor a .*"),
    ],
)
def test_wrong_products_are_found(
    isa: str, spoil: Any, error: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isa and not ISAS:
        pytest.skip(NOT_BUILT)
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    right = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda x, packed: spoil(right(x, packed)))
    result = command("doctor", "--json")
    assert (result.code, result.record["healthy"]) == (1, False)
    assert re.fullmatch(error, result.record["error"])
    table = command("doctor")
    assert table.code == 1
    assert re.fullmatch(f"failed: {error}", line(table.out, "self-check"))


def test_optional_extras(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_version", lambda package: None if package in ("hqq", "transformers") else "1")
    record = command("doctor", "--json").record
    assert record["extras"] == {**{extra: [] for extra in EXTRAS}, "compare": ["hqq"]}
    assert record["transformers"] is None
    text = command("doctor").out
    assert "compare lacks hqq, " in line(text, "extras")
    assert line(text, "extras").endswith("grids is installed, plot is installed, tune is installed")
    assert "transformers is not installed" in text


def unequal(y: Any) -> Any:
    return 1.2 * y


@needs_native
@pytest.mark.parametrize(
    ("where", "name", "spoil", "error"),
    [
        (fused, "handed_cache", lambda found: (False, None), "decoder layers run one operator at a time.* hands them"),
        (fused, "fuse", lambda found: None, "decoder layers run one operator at a time.*nothing is known to be in the"),
        (DecoderLayer, "__call__", unequal, r"transformers, token by token, computes other logits .*\(\d+% off\)"),
        (Sequence, "forward", unequal, r"the engine computes other logits of a small Llama .*\(\d+% off\)"),
        (Sequence, "forward", lambda found: found[0, 0], "TypeError: .*"),
    ],
    ids=["no cache", "not exchanged", "wrong layers", "wrong engine", "broken engine"],
)
def test_ways_that_are_not_taken_or_lead_elsewhere_are_found(
    where: Any, name: str, spoil: Any, error: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(where, name)
    where = install if name == "fuse" else where  # where it is called
    monkeypatch.setattr(where, name, lambda *given: spoil(right(*given)) if name != "fuse" else None)
    result = command("doctor", "--json")
    assert (result.code, result.err, result.record["healthy"]) == (1, "", False)
    assert re.match(error, result.record["error"])


@needs_native
def test_an_engine_that_refuses_is_found(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise UnsupportedError("its kind is 'llama'")

    monkeypatch.setattr(trial, "open_model", refuse)
    result = command("doctor")
    assert result.code == 1
    assert line(result.out, "self-check") == "failed: the engine does not run a small Llama: its kind is 'llama'"
    assert line(result.out, "tokens made by") == "transformers, native layers"


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # as where it cannot be imported
from waterfill.cli.main import main
sys.argv = ["waterfill", "doctor", "--json"]
main()
"""


def test_a_broken_transformers_does_not_stop_it() -> None:
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    record = json.loads(done.stdout)
    assert (done.returncode, done.stderr, record["healthy"]) == (1, "", False)
    assert record["multiplies"] is not None
    assert record["error"].startswith("ModuleNotFoundError: import of transformers halted")
