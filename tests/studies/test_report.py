"""The report without a browser: what it says, that it says all of it, and that no name from a model becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import waterfill
from tests.support import models
from tests.support.commands import Command
from tests.support.documented import documented, shape
from tests.support.pages import Page
from tests.support.plans import SCALAR, plan_for
from waterfill import api
from waterfill.base.errors import WaterfillError
from waterfill.planning.budget import Budget, format_size
from waterfill.planning.planner import Request, make_plan
from waterfill.studies.comparison import Row
from waterfill.studies.comparison.cache import Results
from waterfill.studies.report import Continuation, Report, facts, render, write
from waterfill.studies.report.places import MAX_MARKS, places, units
from waterfill.studies.report.svg import number

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7*7 }}"


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.mark.parametrize("which", ["report", "full"])
def test_the_page_is_well_formed_and_needs_nothing_else(which: str, request: pytest.FixtureRequest) -> None:
    html = render(request.getfixturevalue(which))
    page = Page(html)
    assert html.startswith("<!doctype html>")
    for name, attributes in page.elements:
        for attribute in ("src", "href", "action", "data", "xlink:href", "poster", "srcset"):
            value = attributes.get(attribute)
            assert value is None or value.startswith("#") or value == "data:,", f"<{name} {attribute}={value}>"
    assert not {"iframe", "object", "embed", "base", "form", "img"} & {name for name, _ in page.elements}
    assert not re.search(r"@import|url\(|https?://|\bfetch\b|XMLHttpRequest|WebSocket", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {a["href"] for a in page.all("a")} <= {f"#{name}" for name in ids}


def test_every_tensor_is_there(report: Report) -> None:
    page = Page(render(report))
    cells = page.text
    for tensor in (*report.plan.tensors, *report.plan.kept):
        assert tensor.name in cells
    said = [a["aria-label"] or "" for a in page.all("g", "mark")]
    for tensor in report.plan.tensors:
        charts = 5 if ".layers." in tensor.name else 4  # the map shows layers only
        assert sum(label.startswith(f"{tensor.name}, ") for label in said) == charts
    for fact in ("ref-llama", report.plan.fingerprint, report.plan.identity, "--size 3000000", version("torch")):
        assert fact in cells
    assert "give --original and --text" in " ".join(cells.split())


def test_every_mark_can_be_reached_and_speaks(full: Report) -> None:
    page = Page(render(full))
    marks = page.all("g", "mark")
    assert len(marks) > 5 * len(full.plan.tensors)
    for attributes in marks:
        assert attributes["role"] == "img"
        assert attributes["tabindex"] == "-1"
        assert attributes["aria-label"] == (attributes["data-tip"] or "").replace("\n", ", ")
    for attributes in page.all("svg", "plot"):
        assert attributes["aria-label"]
        assert attributes["role"] == "group"


def test_measurements_samples_and_peers_are_shown(full: Report) -> None:
    page = Page(render(full))
    found = full.divergence
    assert found is not None
    assert (found.windows, found.context, full.text) == (9, 64, "text.py")
    assert number(found.kl) in page.text
    assert f"{found.top1_agreement * 100:.1f} %" in page.text
    assert [sample.prompt for sample in full.samples] == ["def f(", "The"]
    for sample in full.samples:
        assert sample.prompt in page.text
        assert sample.original in page.text
        assert sample.packed in page.text
    assert "HQQ 4 bits" in page.text
    labels = [a["aria-label"] or "" for a in page.all("g", "peer")]
    assert labels == ["HQQ 4 bits, 3.8 MB, 4.50 bits per weight, KL 0.006 ± 0.0001"]
    assert len(page.all("g", "done")) == 1
    assert "waterfill eval packed --against" in page.text
    assert "--context 64 --windows 9" in page.text


def test_names_from_a_model_never_become_markup(report: Report) -> None:
    plan = report.plan
    tensors = tuple(replace(t, name=f"{EVIL}.{i}.{t.name.replace('.', '')}") for i, t in enumerate(plan.tensors))
    kept = tuple(replace(tensor, name=tensor.name + EVIL) for tensor in plan.kept)
    measured = {t.name: report.measured_t2[old.name] for t, old in zip(tensors, plan.tensors, strict=True)}
    row = Row("x", EVIL, EVIL, "1", False, 3_000_000, 4.0, 0.01, 0.001)
    hostile = replace(
        report,
        name=EVIL,
        plan=replace(plan, model=EVIL, tensors=tensors, kept=kept, optimal=EVIL, probe={"kind": "text", "text": EVIL}),
        measured_t2=measured,
        config={EVIL: EVIL},
        samples=(Continuation(EVIL, EVIL, EVIL + "!"),),
        peers=(row,),
        text=EVIL,
        commands=(EVIL,),
        versions={EVIL: EVIL},
    )
    page, plain = (
        Page(render(hostile)),
        Page(render(replace(report, samples=(Continuation("a", "b", "bc"),), peers=(row,)))),
    )
    assert len(page.all("script")) == len(plain.all("script")) == 1
    assert page.all("img") == []
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    text = page.text.replace("\xad", "")
    for name in (tensors[0].name, kept[0].name):
        assert name in text
    assert text.count(EVIL) > len(tensors) + len(kept)
    assert "49" not in re.findall(r"amp;(\d+)", text), "names are no templates"


def test_long_models_have_one_mark_for_the_experts_of_a_layer(report: Report) -> None:
    tensor = replace(report.plan.tensors[1], role="expert")
    many = tuple(
        replace(tensor, name=f"model.layers.{layer}.mlp.experts.{kind}.{expert}")
        for layer in range(4)
        for kind in ("gate_up_proj", "down_proj")
        for expert in range(MAX_MARKS // 8 + 1)
    )
    marks = units(many, {t.name: 0.02 for t in many})
    assert len(marks) == 8
    assert marks[0].size_bytes == (MAX_MARKS // 8 + 1) * tensor.size_bytes
    assert marks[0].bits == pytest.approx(tensor.rate_bits)
    assert marks[0].t2_measured == pytest.approx(0.02)
    html = render(replace(report, plan=replace(report.plan, tensors=many), measured_t2={t.name: 0.02 for t in many}))
    text = Page(html).text
    assert all(t.name in text for t in many)
    assert len(Page(html).all("g", "mark")) < 200


@pytest.mark.parametrize(
    ("build", "request_"),
    [
        (models.tiny_mixtral, {"budget": Budget(bits=4.0)}),
        (models.tiny_gpt2, {"budget": Budget(bits=4.0)}),
        (models.tiny_llama, {"budget": Budget(bits=16.0), "codecs": ("raw",)}),
        (models.tiny_llama, {"budget": Budget(bits=1.6), "codecs": ("higgs-p1-n2", "higgs-p1-n4")}),
        (models.tiny_llama, {"budget": Budget(bits=5.0), "keep": ("*mlp*",)}),
    ],
    ids=["experts", "conv1d", "nothing lost", "no promise", "kept"],
)
def test_other_models_and_other_plans(build: Any, request_: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "model")
    plan = plan_for(checkpoint, **request_)
    waterfill.pack(checkpoint, tmp_path / "out", plan=plan)
    made = waterfill.report(tmp_path / "out")
    page = Page(made.path.read_text("utf-8"))
    for tensor in (*plan.tensors, *plan.kept):
        assert tensor.name in page.text
    assert "nan" not in page.text.lower().split()
    assert made.size_bytes == plan.size_bytes
    again = make_plan(
        "model",
        plan,
        facts.sensitivity_of(tmp_path / "out", plan),
        request_["budget"],
        Request(**{"codecs": SCALAR, **{key: value for key, value in request_.items() if key != "budget"}}),
    )
    assert again.tensors == plan.tensors, "an artifact tells all that planning needs"
    assert (again.size_bytes, again.kept) == (plan.size_bytes, plan.kept)
    assert again.predicted.kl_low == pytest.approx(plan.predicted.kl_low, abs=1e-12)
    if plan.predicted.kl_high is None:
        assert "beyond the range where promises hold" in page.text


def test_places_follow_names() -> None:
    def of(*names: str) -> list[tuple[str, str, str]]:
        plans = [replace_name(name) for name in names]
        return [(p.layer, p.kind, p.colour) for p in places(plans).values()]

    def replace_name(name: str) -> Any:
        return type("T", (), {"name": name})()

    assert of("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj") == [
        ("", "embed_tokens", "f0s0"), ("layer 0", "self_attn.q_proj", "f1s0"), ("layer 0", "self_attn.k_proj", "f1s1"),
    ]  # fmt: skip
    assert of("transformer.h.11.mlp.experts.up.3", "lm_head", "a.b.4") == [
        ("layer 11", "mlp.experts.up", "f1s0"), ("", "lm_head", "f0s0"), ("", "4", "f0s1"),
    ]  # fmt: skip
    assert [place[0] for place in of("encoder.layers.1.x.w", "decoder.blocks.1.x.w")] == ["layers 1.1", "blocks 2.1"]


# ------------------------------------------------------------------------------------------------- the verb and command


def test_the_command_writes_the_page(command: Command, work: Path, ref_llama: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    arguments = ["report", work / "packed", "--output", page]
    result = command(*arguments)
    assert (result.code, result.err) == (0, "")
    size = format_size(api.read_plan(work / "packed").size_bytes)
    assert result.out.startswith(f"{page}\nref-llama in {size}: promised KL ")
    assert "measured" not in result.out
    assert shape(command(*arguments, "--json").record | {"versions": {}, "curve": [], "bound": [], "commands": []}) == (
        shape(documented("report") | {"versions": {}, "curve": [], "bound": [], "commands": []})
    )
    measured = ["--original", ref_llama, "--text", work / "text.py", "--context", "64", "--windows", "3"]
    record = command(*arguments, *measured, "--prompt", "x =", "--max-new-tokens", "3", "--json").record
    assert record["path"] == str(page)
    expected = command(
        "eval", work / "packed", "--against", ref_llama, "--text", work / "text.py", *measured[-4:], "--json"
    ).record  # fmt: skip
    assert record["divergence"]["kl"] == expected["kl"]
    assert len(record["samples"]) == 1
    assert "x =" in page.read_text("utf-8")


def test_the_page_lies_beside_the_artifact_unless_told_otherwise(work: Path, tmp_path: Path) -> None:
    (tmp_path / "there").symlink_to(work / "packed", target_is_directory=True)
    made = waterfill.report(work / "packed")
    assert made.path == (work / "packed.html").resolve()
    made.path.unlink()
    assert not list((work / "packed").glob("*.html"))


def test_what_compare_has_measured_is_shown(report: Report, work: Path, tmp_path: Path) -> None:
    results = Results(report.plan.fingerprint)
    row = Row("hqq-3", "HQQ 3 bits", "hqq", "1", False, 2_900_000, 3.7, 0.03, 0.001)
    results.put({"method": "hqq-3", "text": "t1", "context": 64}, row)
    for name in ("a", "b"):
        results.put({"method": name, "text": "t2", "context": 64}, replace(row, method=name))
    results.put({"method": "c", "text": "t2", "context": 64}, replace(row, method="c", kl=None, problem="no"))
    made = waterfill.report(work / "packed", output=tmp_path / "r.html")
    assert [peer.method for peer in made.peers] == ["a", "b"], "those of the text that most is known of"
    assert not made.same_text


def test_the_commands_are_what_was_asked_for(full: Report, report: Report) -> None:
    name, text = full.name, full.text
    measured = f"--text {text} --context 64 --windows 9"
    assert f"waterfill eval {name} --against ref-llama {measured}" in full.commands
    samples = "--prompt 'def f(' --prompt The --max-new-tokens 6"
    assert full.commands[-1] == f"waterfill report {name} --original ref-llama {measured} {samples}"
    assert report.commands[-1] == f"waterfill report {name}"


def test_the_page_says_whether_methods_were_measured_on_its_text(full: Report, tmp_path: Path) -> None:
    results = Results(full.plan.fingerprint)
    row = replace(full.peers[0], method="other")
    for name in ("other", "another"):
        results.put({"method": name, "text": "another text", "context": 64}, replace(row, method=name))
    ids = torch.arange(9 * 64)
    compared, same = write._compared(full.plan.fingerprint, ids, 64)
    assert ([found.method for found in compared], same) == (["another", "other"], False)
    digest = blake2b(ids.numpy().tobytes(), digest_size=8).hexdigest()
    results.put({"method": "here", "text": digest, "context": 64}, replace(row, method="here"))
    compared, same = write._compared(full.plan.fingerprint, ids, 64)
    assert ([found.method for found in compared], same) == (["here"], True)
    assert "but on another text than this model" in Page(render(full)).text
    assert "on the same text" in " ".join(Page(render(replace(full, same_text=True))).text.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "WORK/text.py"}, "give --original MODEL"),
        ({"output": "WORK"}, r"cannot write .* \(Is a directory\)"),
        ({"original": "OTHER"}, "was packed from other weights"),
        ({"original": "MODEL", "text": "WORK/latin.txt"}, "cannot be read as UTF-8"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, work: Path, ref_llama: Path, llama: Path) -> None:
    places_ = {"WORK": str(work), "OTHER": str(llama), "MODEL": str(ref_llama)}
    given = {key: re.sub("|".join(places_), lambda m: places_[m[0]], value) for key, value in options.items()}
    with pytest.raises(WaterfillError, match=message):
        waterfill.report(work / "packed", **given)
