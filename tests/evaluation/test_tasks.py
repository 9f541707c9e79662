"""Tasks, offline: scores against slow references and against lm-eval's own model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import waterfill
from tests.support import task_samples
from tests.support.commands import Command
from waterfill.base.errors import WaterfillError
from waterfill.evaluation import tasks as tasks_module
from waterfill.evaluation.local_tasks import read_task
from waterfill.evaluation.tasks import PRESETS, names_of, run_tasks, task_specs

HAS_HARNESS = True
try:
    import lm_eval
    import lm_eval.models.huggingface
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm

    from waterfill.evaluation import harness
except ImportError:
    HAS_HARNESS = False
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness is not installed: waterfill[eval]")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    makers: list[Callable[[Path], Path]] = [
        task_samples.multiple_choice,
        task_samples.generation,
        task_samples.documents,
    ]
    return {path.stem: path for path in (maker(folder) for maker in makers)}


@pytest.fixture(scope="module")
def loaded(ref_llama: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(ref_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(ref_llama)


def scores(results: tasks_module.TaskResults) -> dict[tuple[str, str], float]:
    return {(score.task, score.metric): score.value for score in results.scores}


def log_p(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Sum over the tokens that a continuation adds."""
    whole, start = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        rows = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(rows[at - 1, whole[at]]) for at in range(start, len(whole)))


@needs_harness
def test_choices_are_scored_by_probability(files: dict[str, Path], loaded: tuple[Any, Any]) -> None:
    found = scores(run_tasks(*loaded, [read_task(files["continuation"])], batch=4))
    right, right_by_length = 0, 0
    records = [json.loads(line) for line in files["continuation"].read_text().splitlines()]
    for record in records:
        question, choices = record["question"], record["choices"]
        if not question[-1].isspace() and not any(choice[0].isspace() for choice in choices):
            question += " "
        stripped = question.rstrip()
        space = question[len(stripped) :]  # the harness has it before the continuation
        sums = [log_p(*loaded, stripped, space + choice) for choice in choices]
        right += sums.index(max(sums)) == record["answer"]
        by_length = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        right_by_length += by_length.index(max(by_length)) == record["answer"]
    assert found["continuation", "acc"] == pytest.approx(right / len(records))
    assert found["continuation", "acc_norm"] == pytest.approx(right_by_length / len(records))
    assert found["continuation", "acc"] > 0.5  # by chance 0.25


@needs_harness
def test_answers_are_generated_greedily(files: dict[str, Path], loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    found = run_tasks(*loaded, [read_task(files["line"])], batch=1)
    right = []
    for line in files["line"].read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer(record["prompt"], return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(said, skip_special_tokens=True).partition("\n")[0]
        right.append(answer.strip() == record["answer"].strip())
    (score,) = found.scores
    assert score.metric == "exact_match"
    assert score.value == pytest.approx(sum(right) / len(right))
    assert 0 < score.value < 1
    assert (score.task, score.shots, score.samples, score.version) == ("line", 0, task_samples.ANSWERS, "1.0")


@needs_harness
def test_the_harness_draws_no_bars_and_others_do(
    files: dict[str, Path], loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with harness.without_bars():
        run_tasks(*loaded, [read_task(files["line"])], limit=2)
        assert capsys.readouterr().err == ""
        assert list(tqdm(range(3), desc="mine")) == [0, 1, 2]
        assert "mine" in capsys.readouterr().err
    assert lm_eval.api.task.tqdm is lm_eval.models.huggingface.tqdm is tqdm


@needs_harness
def test_word_perplexity_is_lm_evals_own(files: dict[str, Path], ref_llama: Path, work: Path) -> None:
    """Of its `hf` model, which loads the checkpoint itself; a packed model has another."""
    own = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(ref_llama), "dtype": "float32", "device": "cpu"},
        tasks=[read_task(files["documents"])],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )["results"]["documents"]
    result = waterfill.evaluate(work / "packed", ref_llama, tasks=[str(files["documents"])], cache=False)
    assert result.tasks is not None
    assert result.tasks_reference is not None
    found, original = scores(result.tasks), scores(result.tasks_reference)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert original["documents", metric] == own[f"{metric},none"], metric
        assert found["documents", metric] != original["documents", metric]
        assert found["documents", metric] == pytest.approx(original["documents", metric], rel=0.3)


@needs_harness
def test_word_perplexity_counts_words(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    """lm-eval's: exp of the sum of -ln p over all tokens, after the BOS, over words, which white space separates."""
    text = task_samples.source_text()[:1500]
    path = task_samples.write_lines(tmp_path / "one.jsonl", [{"text": text}])
    model, tokenizer = loaded
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    nll = -sum(float(row[token]) for row, token in zip(rows, ids[1:], strict=True))
    found = scores(run_tasks(*loaded, [read_task(path)]))
    assert found["one", "word_perplexity"] == pytest.approx(math.exp(nll / len(re.split(r"\s+", text))), rel=1e-5)
    assert found["one", "bits_per_byte"] == pytest.approx(nll / len(text.encode()) / math.log(2), rel=1e-5)


@needs_harness
def test_an_interrupted_run_asks_only_what_is_missing(
    files: dict[str, Path], loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from waterfill.evaluation import harness

    monkeypatch.setattr(harness, "AT_A_TIME", 8)
    model, tokenizer = loaded
    spec = [read_task(files["continuation"])]
    whole = run_tasks(model, tokenizer, spec, batch=8)
    total = 4 * task_samples.QUESTIONS
    seen: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, all_of_them: int) -> None:
        seen.append((what, done, all_of_them))
        if done == 16:
            raise KeyboardInterrupt

    journal = tmp_path / "scores" / "key"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(model, tokenizer, spec, batch=8, journal=journal, progress=interrupt)
    assert seen == [("tasks: choices", done, total) for done in (0, 8, 16)]
    seen.clear()
    again = run_tasks(model, tokenizer, spec, batch=8, journal=journal, progress=lambda *step: seen.append(step))
    assert seen == [("tasks: choices", done, total - 16) for done in (0, 8, 16)]
    assert again == whole
    assert not list(journal.parent.iterdir())


@needs_harness
def test_the_command(files: dict[str, Path], command: Command, work: Path) -> None:
    names = f"{files['continuation']},{files['line']}"
    said = command("eval", work / "packed", "--tasks", names, "--limit", "3", "--json")
    assert (said.code, said.err) == (0, said.err)
    assert "it/s" not in said.err
    record = said.record["tasks"]
    assert [score["metric"] for score in record["scores"]] == ["acc", "acc_norm", "exact_match"]
    assert {score["samples"] for score in record["scores"]} == {3}
    assert record["limit"] == 3
    table = command("eval", work / "packed", "--tasks", str(files["line"]), "--limit", "2")
    assert table.code == 0
    assert "exact_match (stripped)" in table.out


@needs_harness
def test_a_folder_without_git_is_not_complained_of(
    files: dict[str, Path],
    loaded: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    specs = [read_task(files["continuation"])]
    monkeypatch.chdir(tmp_path)
    run_tasks(*loaded, specs, limit=1)
    assert "git" not in capfd.readouterr().err


@needs_harness
def test_results_are_a_table(files: dict[str, Path], loaded: tuple[Any, Any]) -> None:
    frame = run_tasks(*loaded, [read_task(files["continuation"])], limit=2).to_pandas()
    assert list(frame["metric"]) == ["acc", "acc_norm"]
    assert {"task", "value", "stderr", "shots"} <= set(frame.columns)


@needs_harness
def test_tasks_that_are_not_there(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(TaskManager):  # type: ignore[misc]  # the whole index takes many seconds to read
        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults
            super().__init__(include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Empty)
    with pytest.raises(WaterfillError, match="lm-eval has no task nonsense; `lm-eval ls tasks` lists"):
        run_tasks(*loaded, ["nonsense"])


@needs_harness
def test_a_chat_template_that_is_not_there(files: dict[str, Path], loaded: tuple[Any, Any]) -> None:
    with pytest.raises(WaterfillError, match="a chat template was asked for, but the model's tokenizer has none"):
        run_tasks(*loaded, [read_task(files["line"])], chat_template=True)


@needs_harness
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("no such data set"), r"the data of a task cannot be had \(no such data set\)"),
        (ModuleNotFoundError("No module named 'langdetect'"), r"needs more than is installed \(No module named 'langd"),
        (AssertionError("too long"), r"lm-eval refuses these tasks \(too long\)"),
    ],
)
def test_what_the_harness_refuses(
    error: Exception,
    sentence: str,
    files: dict[str, Path],
    loaded: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    with pytest.raises(WaterfillError, match=sentence):
        run_tasks(*loaded, [read_task(files["line"])])


@needs_harness
@pytest.mark.slow
def test_presets_name_tasks_of_lm_eval() -> None:
    manager = TaskManager()
    for names in PRESETS.values():
        assert all(manager.match_tasks([name]) for name in names)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(WaterfillError, match=r"install the extra with pip install 'waterfill\[eval\]'"):
        run_tasks(None, None, ["piqa"])


def test_names_and_presets(files: dict[str, Path]) -> None:
    assert names_of("a, b,,c") == names_of(["a", "b,c"]) == ("a", "b", "c")
    assert task_specs(["piqa", "alignment", "efficiency"]) == ["piqa", *PRESETS["alignment"]]
    assert task_specs([str(files["line"])])[0]["task"] == "line"  # type: ignore[index]
    with pytest.raises(WaterfillError, match="bbq is asked for more than once"):
        task_specs(["bbq", "alignment"])


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("", "is empty"),
        ("{", "line 1 of .* is no JSON"),
        ('{"text": "a"}\n\n[', "line 3 of .* is no JSON"),
        ('{"question": "a"}', "the first record of .* is of no known kind"),
        ("[1]", "the first record of .* is of no known kind"),
        ('{"text": "a"}\n{"text": 1}', "record 2 of .* is no document like the first; give text"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "record 1 of .* answers 2 of 2 choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": -1}', "record 1 of .* answers -1 of 2 choices"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "record 1 of .* answers 0 of 1 choices"),
        ('{"question": "a", "choices": ["b", ""], "answer": 0}', "give two texts or more"),
        ('{"prompt": "a", "answer": "b", "until": "c"}', "'until' is 'c'; give a list of texts"),
        (
            '{"prompt": "a", "answer": "b", "until": ["c"]}\n{"prompt": "a", "answer": "b"}',
            "record 2 of .* ends otherwise than the first",
        ),
    ],
)
def test_files_that_are_no_tasks(lines: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(lines)
    with pytest.raises(WaterfillError, match=sentence):
        read_task(path)


def test_a_task_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WaterfillError, match=r"absent\.jsonl cannot be read as UTF-8 text"):
        read_task(tmp_path / "absent.jsonl")


def test_choices_follow_after_one_space() -> None:
    from waterfill.evaluation.local_tasks import _asked

    assert _asked({"question": "a", "choices": ["b", "c"]}) == "a "
    assert _asked({"question": "a\n", "choices": ["b", "c"]}) == "a\n"
    assert _asked({"question": "a", "choices": [" b", "c"]}) == "a"
    assert _asked({"question": "", "choices": ["b", "c"]}) == ""
