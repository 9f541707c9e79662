"""What it takes to run a model: counts are exact, peaks in order, and processes are those of one model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command
from waterfill.base.errors import WaterfillError
from waterfill.evaluation.efficiency import Efficiency, measure_efficiency
from waterfill.evaluation.subjects import open_subject

module: Any = sys.modules["waterfill.evaluation.efficiency"]


def test_a_packed_model(command: Command, work: Path, ref_llama: Path) -> None:
    options = ["--prompt-tokens", "12", "--new-tokens", "4", "--json"]
    record = command("eval", work / "packed", "--efficiency", *options).record["efficiency"]
    subject = open_subject(work / "packed")
    assert record["size_bytes"] == sum(file.stat().st_size for file in (work / "packed").glob("*.safetensors"))
    assert record["weights"] == subject.weights == open_subject(ref_llama).weights == 6_819_072
    assert record["bits_per_weight"] == 8 * record["size_bytes"] / record["weights"]
    stages = [record[f"memory_{stage}_bytes"] for stage in ("start", "load", "prefill", "generation")]
    assert stages == sorted(stages)
    assert stages[0] > 50e6
    assert stages[1] > stages[0]
    assert record["memory_batch_bytes"] > stages[0]
    for name in ("first_token_s", "tokens_per_s", "first_token_batch_s", "tokens_per_s_batch"):
        assert record[name] > 0, name
    assert (record["batch"], record["prompt_tokens"], record["new_tokens"]) == (8, 12, 4)
    assert record["dtype"] == "bfloat16"


def test_sizes_that_do_not_fit(ref_llama: Path) -> None:
    with pytest.raises(WaterfillError, match=r"1000 \+ 128 tokens were asked for, but the model has 1024 positions"):
        measure_efficiency(ref_llama, prompt_tokens=1000, new_tokens=128)
    with pytest.raises(WaterfillError, match="0 tokens to read and 128 to write"):
        measure_efficiency(ref_llama, prompt_tokens=0)
    with pytest.raises(WaterfillError, match="a batch of 0 sequences"):
        measure_efficiency(ref_llama, batch=0)


def test_default_lengths_fit_the_model(ref_llama: Path) -> None:
    subject = open_subject(ref_llama)
    assert module._lengths(subject, None, None) == (256, 128)
    subject.positions = 100
    assert module._lengths(subject, None, None) == (50, 50)
    subject.positions = None
    assert module._lengths(subject, None, None) == (256, 128)


def test_what_a_process_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"model": str(tmp_path / "absent"), "revision": None, "form": "auto", "rate": None, "threads": 1}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(task)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module.main()
    assert "absent" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo out of memory >&2; exit 3", r"the process that ran MODEL ended with code 3 \(out of memory\)"),
        ('echo \'{"error": "the model is torn"}\'', "the model is torn"),
    ],
)
def test_a_process_that_fails_is_quoted(
    script: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(WaterfillError, match=sentence):
        module._in_process({"model": "MODEL"})


def test_energy_is_summed_over_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POWERCAP", tmp_path)
    assert module._energy_j() is None

    def zone(name: str, kind: str, energy_uj: int) -> None:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{kind}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")

    zone("intel-rapl:0", "package-0", 10_000_000)
    zone("intel-rapl:1", "package-1", 95_000_000)
    zone("intel-rapl:0:0", "core", 7_000_000)
    zone("intel-rapl:2", "psys", 9_000_000)
    before = module._energy_j()
    zone("intel-rapl:0", "package-0", 12_500_000)
    zone("intel-rapl:1", "package-1", 3_000_000)  # it has begun again from 0
    assert module._used_j(before, module._energy_j()) == pytest.approx(2.5 + 8)
    assert module._used_j(before, None) is None
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as where only root may read it
    assert module._energy_j() is None


def test_results_are_plain_data() -> None:
    fields = dict.fromkeys(Efficiency.__dataclass_fields__, 1.0) | {"energy_j_per_token": None, "dtype": "float32"}
    result = Efficiency(**fields)  # type: ignore[arg-type]
    assert result.to_dict() == fields
    assert '"energy_j_per_token": null' in result.to_json()
