"""Small artifacts for the tests: specs, the bytes that go into them, and a pack loop that can be interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from waterfill.files.artifact import RAW, ArtifactWriter, Buffer, Layout, TensorSpec, lay_out

CONFIG = b'{"quantization_config": {"quant_method": "waterfill", "format_version": 1}}\n'
FILES: dict[str, bytes | Path] = {"config.json": CONFIG, "tokenizer.json": b"{}\n"}


def raw(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, RAW, shape, dtype, (Buffer(name, dtype, shape),))


def packed(name: str, rows: int, columns: int, code_bytes: int) -> TensorSpec:
    scales = Buffer(f"{name}.scales", "F16", (rows, 1))
    codes = Buffer(f"{name}.codes", "U8", (code_bytes,))
    return TensorSpec(name, "sample-p2-n16", (rows, columns), "BF16", (scales, codes))


def model() -> list[TensorSpec]:
    """Execution order of a tiny model: kept and packed tensors interleaved, as a caller would give them."""
    return [
        packed("embed", 6, 8, 24),
        raw("layers.0.norm.weight", "BF16", 8),
        packed("layers.0.q_proj", 4, 8, 16),
        raw("layers.0.q_proj.bias", "F32", 4),
        packed("layers.0.mlp.experts.gate_up_proj.3", 2, 8, 8),
        raw("norm.weight", "BF16", 8),
        raw("flag", "U8", 2),
    ]


def content(buffer: Buffer) -> bytes:
    """Deterministic bytes that differ from buffer to buffer."""
    return hashlib.shake_128(buffer.name.encode()).digest(buffer.size_bytes)


def fill(writer: ArtifactWriter, tensor: TensorSpec) -> None:
    """Write one tensor in two blocks per buffer, the later one first, and complete it."""
    for buffer in tensor.buffers:
        data = content(buffer)
        half = len(data) // 2
        writer.write(buffer.name, half, data[half:])
        writer.write(buffer.name, 0, memoryview(data)[:half])
    number = len(tensor.name)
    writer.complete(
        tensor.name, exponent=0 if tensor.codec == RAW else -number, t2=0.0 if tensor.codec == RAW else 1 / number
    )


def build(
    out: Path,
    specs: Sequence[TensorSpec] | Layout | None = None,
    *,
    shard_bytes: int = 4_000_000_000,
    identity: str = "plan",
    overwrite: bool = False,
) -> Path:
    """Pack `specs` (default: `model()`) into `out`, continuing an interrupted run if there is one."""
    layout = specs if isinstance(specs, Layout) else lay_out(specs or model(), shard_bytes=shard_bytes)
    with ArtifactWriter(out, layout, identity, overwrite=overwrite) as writer:
        for tensor in writer.pending():
            fill(writer, tensor)
        return writer.publish(FILES)


def directory_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names_in(folder: Path) -> list[str]:
    """Names of what is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())
