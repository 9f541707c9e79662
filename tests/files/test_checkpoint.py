"""Opening checkpoints: what is read, how little of it, and what is said when something is wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_gpt2, tiny_llama
from waterfill.base.errors import CheckpointError
from waterfill.files.checkpoint import check_finite, open_checkpoint

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", layers=1)


@pytest.fixture
def sharded_dir(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", shards=3)


def failure(source: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert "; " in message, "what was given; what to do"
    assert not message.endswith(".")
    return message


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_reads_back_as_stored(tmp_path: Path, dtype: str, shards: int) -> None:
    path = tiny_llama(tmp_path, dtype=DTYPES[dtype], shards=shards)
    expected = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    checkpoint = open_checkpoint(path)
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) == shards
    assert checkpoint.tensors.keys() == expected.keys()
    assert checkpoint.config["model_type"] == "llama"
    for name, tensor in expected.items():
        info = checkpoint.tensors[name]
        assert (info.name, info.shape, info.dtype) == (name, tuple(tensor.shape), dtype)
        raw = info.file.read_bytes()[info.offset : info.offset + info.size_bytes]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert torch.equal(checkpoint.read(name), tensor)


def test_slices(tmp_path: Path) -> None:
    stored = {"m": torch.randn(7, 5), "experts": torch.randn(3, 4, 6), "scalar": torch.tensor(2.0)}
    (tmp_path / "config.json").write_text("{}")
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("m", slice(2, 6)), stored["m"][2:6])
    assert torch.equal(checkpoint.read("experts", (1, slice(1, 3))), stored["experts"][1, 1:3])
    assert torch.equal(checkpoint.read("experts", (2, slice(None), slice(4, 6))), stored["experts"][2, :, 4:6])
    assert checkpoint.read("scalar").item() == 2.0
    with pytest.raises(CheckpointError, match="'absent'"):
        checkpoint.read("absent")


def test_a_row_range_does_not_read_the_tensor(tmp_path: Path) -> None:
    rows, columns = 2**19, 1024
    header = json.dumps({"w": {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, rows * columns * 2]}})
    header += " " * (-len(header) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:  # 1 GiB, sparse
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(file.tell() + rows * columns * 2)
    (tmp_path / "config.json").write_text("{}")
    # In a process of its own, because peak memory never falls.
    script = """
import resource, sys
from waterfill.files.checkpoint import open_checkpoint
checkpoint = open_checkpoint(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 2**19, 2**14):
    assert not checkpoint.read("w", slice(start, start + 64)).any()
checkpoint.fingerprint
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB


def test_extra_files_are_what_an_artifact_needs(checkpoint_dir: Path) -> None:
    wanted = [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]
    unwanted = ["README.md", "model.safetensors.index.json", "pytorch_model.bin", "modeling_x.py", ".gitattributes"]
    for name in wanted + unwanted:
        (checkpoint_dir / name).write_text("{}")
    (checkpoint_dir / "original").mkdir()
    (checkpoint_dir / "original" / "params.json").write_text("{}")
    assert [file.name for file in open_checkpoint(checkpoint_dir).extra_files()] == wanted


# -- identity ---------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_weights_not_the_place(sharded_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sharded_dir, tmp_path / "copy")
    assert open_checkpoint(copy).fingerprint == open_checkpoint(sharded_dir).fingerprint
    assert re.fullmatch(r"[0-9a-f]{32}", open_checkpoint(copy).fingerprint)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_fingerprint_sees_changed_weights_in_any_tensor(checkpoint_dir: Path, where: str) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    before = checkpoint.fingerprint
    for tensor in checkpoint.tensors.values():
        position = {"first": 0, "middle": tensor.size_bytes // 2, "last": tensor.size_bytes - 1}[where]
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset + position)
            original = file.read(1)
            file.seek(tensor.offset + position)
            file.write(bytes([original[0] ^ 1]))
            file.flush()
            assert open_checkpoint(checkpoint_dir).fingerprint != before
            file.seek(tensor.offset + position)
            file.write(original)
    assert open_checkpoint(checkpoint_dir).fingerprint == before


def test_fingerprint_sees_the_config(checkpoint_dir: Path) -> None:
    before = open_checkpoint(checkpoint_dir).fingerprint
    config = json.loads((checkpoint_dir / "config.json").read_text())
    (checkpoint_dir / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert open_checkpoint(checkpoint_dir).fingerprint != before


# -- finite weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_check_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(torch.full((1000,), largest, dtype=dtype), "w", Path("f"))  # finite, though its sum is not
    check_finite(torch.empty(0, dtype=dtype), "w", Path("f"))
    bad = torch.zeros(10, 10, dtype=dtype)
    bad[3, 4], bad[5, 6], bad[5, 7] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(CheckpointError, match=r"dir/f: tensor 'w' holds 3 NaN or Inf among the 100"):
        check_finite(bad, "w", Path("dir/f"))


# -- what can be wrong with the files ---------------------------------------------------------------------------------


def test_missing_config(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "config.json").unlink()
    assert "has no config.json" in failure(checkpoint_dir)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff"])
def test_damaged_config(checkpoint_dir: Path, text: str) -> None:
    (checkpoint_dir / "config.json").write_bytes(text.encode("latin-1"))
    assert str(checkpoint_dir / "config.json") in failure(checkpoint_dir)


def test_shard_in_the_index_but_absent(sharded_dir: Path) -> None:
    (sharded_dir / "model-00002-of-00003.safetensors").unlink()
    message = failure(sharded_dir)
    assert str(sharded_dir / "model-00002-of-00003.safetensors") in message
    assert "places tensor 'model." in message


def test_tensor_in_the_index_but_not_in_its_shard(sharded_dir: Path) -> None:
    index = json.loads((sharded_dir / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.embed_tokens.weight"] = "model-00003-of-00003.safetensors"
    (sharded_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert re.search(r"model-0000\d-of-00003.safetensors holds no tensor 'model\.", failure(sharded_dir))


@pytest.mark.parametrize("weight_map", [None, {}, [], {"w": 3}, {"w": "../x.safetensors"}, {"w": "x.bin"}])
def test_damaged_index(sharded_dir: Path, weight_map: Any) -> None:
    (sharded_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert str(sharded_dir / "model.safetensors.index.json") in failure(sharded_dir)


def test_truncated_shard_names_the_first_tensor_that_is_cut(sharded_dir: Path) -> None:
    file = sharded_dir / "model-00001-of-00003.safetensors"
    tensors = [tensor for tensor in open_checkpoint(sharded_dir).tensors.values() if tensor.file == file]
    cut = sorted(tensors, key=lambda tensor: tensor.offset)[2]
    file.write_bytes(file.read_bytes()[: cut.offset + cut.size_bytes - 1])
    message = failure(sharded_dir)
    assert str(file) in message
    assert repr(cut.name) in message


@given(data=st.data())
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated"
    if not path.exists():
        tiny_gpt2(path, hidden=32, layers=1, vocab=64)
        shutil.copy(path / "model.safetensors", path / "whole")
    whole = (path / "whole").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert str(path / "model.safetensors") in failure(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"{{{{{{{{",
        (16).to_bytes(8, "little") + b'["not a header"]',
        (64).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-4,4]}}'.ljust(64) + bytes(8),
        (64).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}'.ljust(64) + bytes(8),
    ],
)
def test_corrupt_header(checkpoint_dir: Path, content: bytes) -> None:
    (checkpoint_dir / "model.safetensors").write_bytes(content)
    assert f"{checkpoint_dir / 'model.safetensors'} is truncated or not a safetensors file" in failure(checkpoint_dir)


def test_file_that_goes_after_opening(checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    (checkpoint_dir / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors can no longer be read for tensor 'model\.norm\.weight'"
    ):
        checkpoint.read("model.norm.weight")


def test_no_weights(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "model.safetensors").unlink()
    assert "has no weights; give a directory with model.safetensors" in failure(checkpoint_dir)


def test_pickles_are_refused_with_a_command_that_converts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(tmp_path / "it's a model", layers=1, tokenizer=True)
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    torch.save(expected, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    message = failure(path)
    assert "pytorch_model.bin" in message
    python, option, code = shlex.split(message.partition("convert it with: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # the command, without another interpreter's start
    converted = open_checkpoint(tmp_path / "it's a model-safetensors")
    assert converted.tensors.keys() == expected.keys()
    assert torch.equal(converted.read("lm_head.weight"), expected["lm_head.weight"])
    assert (converted.path / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, "already quantised (gptq)"),
        ({"quant_method": "waterfill"}, "already packed"),
    ],
)
def test_quantised_checkpoints_are_refused(checkpoint_dir: Path, quantization: dict[str, Any], expected: str) -> None:
    config = json.loads((checkpoint_dir / "config.json").read_text())
    (checkpoint_dir / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    message = failure(checkpoint_dir)
    assert expected in message
    assert str(checkpoint_dir) in message


# -- where a source may come from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/no such", "a/b/c", "..", Path("org/name")])
def test_paths_that_do_not_exist_never_reach_the_hub(source: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", MagicMock(side_effect=AssertionError))
    message = failure(source)
    assert "config.json" in message if source == ".." else "does not exist; give a directory" in message


def test_file_instead_of_directory(checkpoint_dir: Path) -> None:
    assert "is a file; give the directory" in failure(checkpoint_dir / "model.safetensors")


def test_revision_of_a_directory(checkpoint_dir: Path) -> None:
    assert "has no revision 'main'" in failure(checkpoint_dir, revision="main")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], list[dict[str, Any]]]:
    """Serve a directory as any hub id; returns the list that download calls are recorded in."""

    def serve(remote: Path) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def snapshot_download(repository: str, **options: Any) -> str:
            calls.append({"repository": repository, **options})
            local = tmp_path / "snapshots" / "c0ffee"
            local.mkdir(parents=True, exist_ok=True)
            names = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
            allowed, ignored = options["allow_patterns"], options["ignore_patterns"]
            for name in huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=allowed, ignore_patterns=ignored
            ):
                shutil.copy(remote / name, local / name)
            return str(local)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return serve


@pytest.mark.parametrize("shards", [1, 3])
def test_hub_download_fetches_what_is_needed_from_one_commit(
    tmp_path: Path, hub: Callable[[Path], list[dict[str, Any]]], shards: int
) -> None:
    remote = tiny_llama(tmp_path / "remote", shards=shards, tokenizer=True)
    for name in ("original/x.safetensors", "consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"x")
    calls = hub(remote)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert [(call["repository"], call["revision"]) for call in calls] == [("org/name", "v1"), ("org/name", "c0ffee")]
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) == shards
    assert checkpoint.fingerprint == open_checkpoint(remote).fingerprint
    local = {file.name for file in checkpoint.path.iterdir()}
    assert local >= {"config.json", "tokenizer.json", "generation_config.json"}
    assert not local & {"x.safetensors", "consolidated.safetensors", "pytorch_model.bin", "README.md"}


def test_hub_model_that_cannot_be_packed_is_refused_before_its_weights_travel(
    checkpoint_dir: Path, hub: Callable[[Path], list[dict[str, Any]]]
) -> None:
    (checkpoint_dir / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    calls = hub(checkpoint_dir)
    assert "already quantised (awq)" in failure("org/name")
    assert len(calls) == 1


def test_hub_model_without_safetensors(checkpoint_dir: Path, hub: Callable[[Path], list[dict[str, Any]]]) -> None:
    (checkpoint_dir / "model.safetensors").rename(checkpoint_dir / "pytorch_model.bin")
    hub(checkpoint_dir)
    message = failure("org/name")
    assert message.startswith("org/name has no model.safetensors")
    assert 'src, dst = "org/name", "name-safetensors"' in message


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GatedRepoError("401", response=MagicMock()), "org/name@v1 is gated; accept its terms"),
        (
            RepositoryNotFoundError("404", response=MagicMock()),
            "org/name is neither a directory here nor a public model",
        ),
        (RevisionNotFoundError("404", response=MagicMock()), "org/name@v1 does not exist; give a branch"),
        (LocalEntryNotFoundError("offline\nand long"), "cannot be downloaded from the hub (offline)"),
        (ConnectionError("no route"), "cannot be downloaded from the hub (no route)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_hub_errors(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", MagicMock(side_effect=error))
    assert expected in failure("org/name", revision="v1")
