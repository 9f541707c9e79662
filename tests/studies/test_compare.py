"""The comparison: honest bytes, our own from a real artifact, methods by name, pictures, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

import waterfill
from tests.support.commands import Command
from tests.support.comparisons import REQUEST, as_half, compared, method
from tests.support.documented import documented, shape
from waterfill.base.errors import WaterfillError
from waterfill.files.artifact import Buffer
from waterfill.planning.budget import Budget
from waterfill.planning.plan import Calibration
from waterfill.planning.planner import Request
from waterfill.studies.comparison import (
    CurvePoint,
    Row,
    StudiedModel,
    Unavailable,
    known,
    select,
)
from waterfill.studies.comparison.curve import between, predicted_curve
from waterfill.studies.comparison.ours import pack_and_decode, plan_for
from waterfill.studies.comparison.rounding import round_to_nearest
from waterfill.studies.comparison.stored import file_bytes, kept_buffers, quantised

# ---------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_those_of_a_safetensors_file() -> None:
    tensors = {"a.codes": torch.zeros(3, 7, dtype=torch.uint8), "b": torch.zeros(5), "c": torch.zeros(2, 2).half()}
    buffers = [Buffer("b", "F32", (5,)), Buffer("c", "F16", (2, 2)), Buffer("a.codes", "U8", (3, 7))]
    assert file_bytes(buffers) == len(save(tensors, {"format": "pt"}))


def test_every_matrix_goes_through_and_every_byte_is_counted(subject: StudiedModel, ids: Tensor) -> None:
    row = compared(subject, ids, method("half", as_half)).rows[0]
    matrices = [Buffer(f"{m.name}.w", "F16", m.shape) for m in subject.architecture.matrices]
    assert row.size_bytes == file_bytes([*kept_buffers(subject.architecture), *matrices])
    assert row.bits == 16.0
    assert row.problem is None
    assert 0 <= row.kl < 1e-6


def test_what_gives_the_weights_back_loses_nothing(subject: StudiedModel, ids: Tensor) -> None:
    row = compared(subject, ids, method("same", lambda weight: quantised(weight, {"w": weight}))).rows[0]
    assert (row.kl, row.kl_stderr, row.top1_agreement) == (0.0, 0.0, 1.0)
    assert row.ppl == row.ppl_reference
    assert row.bits == 32.0


def test_one_method_does_not_leak_into_the_next(subject: StudiedModel, ids: Tensor) -> None:
    def only_large(weight: Tensor) -> Any:
        if weight.shape[0] < 200:
            raise Unavailable("too few rows")
        return quantised(torch.zeros_like(weight), {"w": weight.half()})

    broken, same = compared(
        subject, ids, method("zero", only_large), method("same", lambda weight: quantised(weight, {"w": weight}))
    ).rows
    assert broken.kl > 0.1
    assert same.kl == 0.0
    assert broken.note.startswith("as they are: ")
    assert "too few rows" in broken.note
    assert compared(subject, ids, method("z", only_large)).rows[0].kl == broken.kl, "whatever ran before"


@pytest.mark.parametrize("zero", ["none", "integer", "minimum"])
def test_rounding_to_nearest(zero: Any) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    errors = {}
    for bits in (3, 4, 8):
        result = round_to_nearest(weight, bits, zero)
        errors[bits] = float((result.weight - weight).square().mean())
        groups = 64 * 256 // 64
        zeros = {"none": 0, "integer": bits * groups // 8, "minimum": 2 * groups}[zero]
        assert result.size_bytes == bits * 64 * 256 // 8 + 2 * groups + zeros
        levels = {len(set(group.tolist())) for group in result.weight.reshape(-1, 64)}
        assert max(levels) <= 2**bits
    assert 0.02 < errors[3] < 0.1
    assert 3.5 < errors[3] / errors[4] < 6
    assert errors[8] < 1e-3


# ----------------------------------------------------------------------------------------------------------- our own


def test_ours_is_what_pack_writes_and_load_runs(subject: StudiedModel, ids: Tensor, tmp_path: Path) -> None:
    plan = plan_for(subject, Budget(bits=4.2), REQUEST)
    weights: dict[str, Tensor] = {}
    candidate = pack_and_decode(subject, plan, weights.__setitem__)
    waterfill.pack(subject.checkpoint.path, tmp_path / "out", plan=plan)
    assert candidate.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size == plan.size_bytes
    model = waterfill.load(tmp_path / "out", dtype=torch.float32)
    assert set(weights) == {tensor.name for tensor in plan.tensors if tensor.codec != "raw"}
    for name, weight in weights.items():
        loaded = torch.mul(model.get_submodule(name).weight, 1.0)  # kernels round grids to whole steps
        assert float((loaded - weight).square().sum()) < 1e-3 * float(weight.square().sum()), name
    row = compared(subject, ids, ours=("waterfill",), budgets=[Budget(bits=4.2)]).rows[0]
    assert (row.size_bytes, row.bits) == (plan.size_bytes, plan.bits)
    assert (row.predicted_kl, row.predicted_low) == (plan.predicted.kl, plan.predicted.kl_low)
    assert row.kl > 0


def test_ours_stands_beside_every_peer_within_its_bytes(subject: StudiedModel, ids: Tensor) -> None:
    rounded = method("rounded", partial(round_to_nearest, bits=4, zero="none"))
    rows = compared(subject, ids, rounded, ours=("waterfill", "waterfill-uniform"), match=True).rows
    assert [row.method for row in rows] == ["waterfill", "waterfill-uniform", "rounded"]
    assert [row.ours_kl for row in rows[:2]] == [None, None]
    peer = rows[2]
    assert peer.ours_size_bytes <= peer.size_bytes
    assert peer.ours_kl is not None
    assert peer.ratio == peer.ours_kl / peer.kl


def test_ours_with_feedback_needs_tokens_and_is_planned_by_them(subject: StudiedModel, ids: Tensor) -> None:
    tokens = torch.randint(0, 60, (8, 64), generator=torch.Generator().manual_seed(3))
    calibrated = replace(subject, calibration=tokens, calibrated_on=Calibration("self", 8, 64, 0, None))
    plain, fed = compared(calibrated, ids, ours=("waterfill", "waterfill-feedback")).rows
    assert (fed.title, fed.calibrated, fed.problem) == ("waterfill, with feedback, 4 bits", True, None)
    assert fed.size_bytes == plain.size_bytes
    assert fed.predicted_kl < plain.predicted_kl
    assert fed.kl < plain.kl
    missing = replace(subject, calibration=None)
    (row,) = compared(missing, ids, ours=("waterfill-feedback",)).rows
    assert row.problem == "it needs calibration tokens"


def test_ours_is_planned_for_storage_or_for_memory(subject: StudiedModel, ids: Tensor) -> None:
    rounded = method("rounded", partial(round_to_nearest, bits=2, zero="none"))
    requests = (Request(purpose=purpose) for purpose in ("storage", "memory"))
    storage, memory = (compared(subject, ids, rounded, match=True, request=request) for request in requests)
    assert memory.curve[0].kl > storage.curve[0].kl, "fixed rates lose more for the same bytes"
    assert memory.rows[0].ours_kl != storage.rows[0].ours_kl, "one is not taken for the other where results are kept"
    assert memory.rows[0].kl == storage.rows[0].kl, "a peer is what it is"


def test_a_peer_is_ahead_only_beyond_the_errors(subject: StudiedModel, ids: Tensor) -> None:
    found = compared(subject, ids)
    row = Row("p", "P", "peer", None, False, 100, 1.0, 0.010, 0.001, ours_kl=0.02, ours_kl_stderr=0.001)
    clear = replace(row, method="clear")
    close = replace(row, method="close", kl=0.017)
    ours = replace(row, method="ours", family="waterfill")
    assert replace(found, rows=(clear, close, ours)).ahead == (clear,)


def test_a_budget_that_no_plan_meets_has_a_row(subject: StudiedModel, ids: Tensor) -> None:
    row = compared(subject, ids, ours=("waterfill",), budgets=[Budget(bits=0.5)]).rows[0]
    assert row.kl is None
    assert row.problem is not None
    assert row.problem.startswith("--bits 0.5 is less than this model needs")


def test_the_curve_is_what_plans_promise(subject: StudiedModel) -> None:
    curve = predicted_curve(subject.architecture, subject.sensitivity, REQUEST, bits=(0.1, 2.5, 3, 4, 4.0001))
    assert len(curve) == 3, "what cannot be met is left out, and what repeats"
    plan = plan_for(subject, Budget(bits=3), REQUEST)
    assert (
        CurvePoint(plan.size_bytes, plan.bits, plan.predicted.kl, plan.predicted.kl_low, plan.predicted.kl_high)
        in curve
    )
    middle = between(curve, math.sqrt(curve[0].size_bytes * curve[1].size_bytes))
    assert middle is not None
    assert curve[1].kl < middle < curve[0].kl
    assert between(curve, curve[1].size_bytes) == pytest.approx(curve[1].kl)
    assert between(curve, curve[0].size_bytes - 1) is None


def test_a_comparison_is_plain_data(subject: StudiedModel, ids: Tensor) -> None:
    def fails(weight: Tensor) -> Any:
        raise Unavailable("not here")

    rounded = method("rounded", partial(round_to_nearest, bits=4, zero="none"))
    found = compared(subject, ids, rounded, method("none", fails), match=True)
    record = json.loads(found.to_json())
    assert record == json.loads(json.dumps(found.to_dict()))
    assert [row["ratio"] for row in record["rows"]] == [found.rows[0].ratio, None]
    assert record["curve"][0]["kl"] == found.curve[0].kl
    pytest.importorskip("pandas", reason="pandas is not installed: waterfill[eval]")
    table = found.to_pandas()
    assert list(table["method"]) == ["rounded", "none"]
    assert list(table.columns) == [*Row.__dataclass_fields__, "ratio"]
    assert table["kl"][0] == found.rows[0].kl
    assert found.rows[0].to_pandas()["kl"] == found.rows[0].kl


# ---------------------------------------------------------------------------------------------------------- the methods


def test_methods_are_selected_by_pattern() -> None:
    assert [found.name for found in select(["hqq-4", "bnb-nf4*"])] == ["bnb-nf4", "bnb-nf4-double", "hqq-4"]
    assert len(select()) == len(set(known())) > 40
    with pytest.raises(WaterfillError, match=r"no method matches 'awq\*'; there are "):
        select(["awq*"])
    for found in select():
        calibrated = found.name.startswith(("gptq-", "slim-", "billm", "anyprec-")) or found.name.endswith("-imatrix")
        assert found.calibrated == calibrated


def test_a_library_that_is_absent_says_so_in_its_row(
    subject: StudiedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes.functional", "hqq.core.quantize", "optimum.quanto", "torchao.quantization"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # importing it fails
    names = ["bnb-nf4", "hqq-4", "quanto-int4", "torchao-int8"]
    for row in compared(subject, ids, *select(names)).rows:
        assert row.kl is None
        assert row.problem is not None
        assert "pip install 'waterfill[compare]'" in row.problem


def test_plots_show_everything(subject: StudiedModel, ids: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from waterfill.studies.comparison.plot import check, plot, save

    found = compared(
        subject, ids, method("half", as_half), method("m", partial(round_to_nearest, bits=4, zero="none")),
        ours=("waterfill",), budgets=[Budget(bits=3.0), Budget(bits=5.0)],
    )  # fmt: skip
    figure = plot(found)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"promised", "test", "waterfill"} <= set(labels)
    drawn = {label: bars for bars, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    assert list(drawn["waterfill"].lines[0].get_xdata()) == [
        row.size_bytes for row in found.measured if row.method == "waterfill"
    ]
    save(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    for name, sentence in (("plot", "no kind of picture"), ("plot.doc", "no kind"), ("plot.png/a.png", "cannot write")):
        with pytest.raises(WaterfillError, match=sentence):
            check(tmp_path / name)


# ------------------------------------------------------------------------------------------------- the verb and command


def test_the_command(command: Command, work: Path, ref_llama: Path, tmp_path: Path) -> None:
    arguments = ["compare", ref_llama, "--text", work / "text.py", "--context", "64", "--windows", "3"]
    arguments += ["--sensitivity", work / "plan.sensitivity.json", "--codec", "higgs-p1-*", "--bits", "3,5"]
    arguments += ["--size", "3MB", "--methods", "waterfill,rtn-4"]
    result = command(*arguments, "--json")
    assert result.code == 0
    record = result.record
    assert shape(record) == shape(documented("compare"))
    assert [row["method"] for row in record["rows"]] == ["waterfill"] * 3 + ["rtn-4"]
    sizes = [row["size_bytes"] for row in record["rows"]]
    assert sizes[0] <= 3_000_000
    assert sizes[1] < sizes[0] < sizes[2]
    losses = [row["kl"] for row in record["rows"][:3]]
    assert losses[1] > losses[0] > losses[2]
    rounded = record["rows"][3]
    assert rounded["ours_size_bytes"] <= rounded["size_bytes"]
    assert rounded["ratio"] < 1
    assert (record["windows"], record["tokens"], record["context"]) == (3, 189, 64)
    table = command(*arguments, "--no-match", "--methods", "hqq-4", "--methods", "rtn-4")
    assert "round to nearest, 4 bits" in table.out
    assert "waterfill, 3 bits" in table.out
    assert "189 tokens of text.py in windows of 64" in table.out
    assert table.err.startswith("compared in ")
    assert "ratio" not in table.out
    assert "ratio: that over the method's" in command(*arguments).out


def test_the_purpose_reaches_the_plans(command: Command, work: Path, ref_llama: Path) -> None:
    arguments = ["compare", ref_llama, "--text", work / "text.py", "--context", "64", "--windows", "1", "--json"]
    arguments += ["--sensitivity", work / "plan.sensitivity.json", "--methods", "waterfill", "--bits", "0.1"]
    storage, memory = command(*arguments).record, command(*arguments, "--for", "memory").record
    assert memory["rows"][0]["title"] == "waterfill, for memory, 0.1 bits"
    assert len({point["size_bytes"] for point in memory["curve"]}) > 2
    assert memory["curve"] != storage["curve"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "awq"], "no method matches 'awq'"),
        (["--bits", "three"], "'three' is not a number"),
        (["--size", "3XB"], "'3XB' is not a size"),
        (["--context", "1"], "context is 1; choose a whole number from 2"),
    ],
)
def test_refusals(options: list[str], message: str, command: Command, work: Path, ref_llama: Path) -> None:
    reuse = ["--sensitivity", work / "plan.sensitivity.json", "--methods", "rtn-4"]
    result = command("compare", ref_llama, "--text", work / "text.py", *reuse, *options)
    assert result.code == 2
    assert message in result.err
