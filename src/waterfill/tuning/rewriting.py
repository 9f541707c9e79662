"""An artifact anew with some tensors changed: everything else is copied, to the bit.

artifact + {tensor: its buffers} ──lay_out──► ArtifactWriter ──► OUT, with a record of what was done
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from waterfill.base.dtypes import TORCH_DTYPES
from waterfill.base.errors import WaterfillError
from waterfill.base.progress import Progress, stage
from waterfill.codecs import LOSSLESS, lossless
from waterfill.files.artifact import (
    SHARD_BYTES,
    Artifact,
    ArtifactWriter,
    Buffer,
    StoredTensor,
    TensorSpec,
    digest,
    lay_out,
)
from waterfill.files.artifact.format import buffer_name
from waterfill.files.artifact.manifest import INDEX

TUNING_FILE = "waterfill-tuning.json"

Buffers = Mapping[str, torch.Tensor]
"""Of one tensor, by key."""


def scales_buffers(tensor: StoredTensor, scales: torch.Tensor) -> Buffers:
    """A packed matrix with other scales, float16 `[out, groups]`: as many bytes as before.

    Raises:
        WaterfillError: it has no such scales.
    """
    stored = dict(zip(tensor.keys, tensor.buffers, strict=True)).get("scales")
    if stored is None or (stored.dtype, stored.shape) != ("F16", tuple(scales.shape)):
        raise WaterfillError(f"tensor {tensor.name!r} is not stored with scales {list(scales.shape)}; pack it again")
    return {"scales": scales}


def kept_buffers(tensor: StoredTensor, values: torch.Tensor) -> Buffers:
    """A tensor that is stored as it is, with other values; coded losslessly if it was."""
    numbers = values.detach().to(TORCH_DTYPES[tensor.dtype]).contiguous()
    return {lossless.BUFFER: lossless.encode(numbers)} if tensor.codec == LOSSLESS else {"": numbers}


def rewrite(
    artifact: Artifact,
    out: Path,
    changed: Mapping[str, Buffers],
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `artifact` to `out` with the changed buffers in the place of its own, and `files` besides its own.

    Raises:
        ArtifactError: a buffer that is copied is damaged; `out` cannot be written.
    """
    specs = [_spec(tensor, changed.get(tensor.name, {})) for tensor in artifact.tensors.values()]
    known = artifact.stated()[0]
    identity = digest(
        b"".join(
            [repr(sorted(known.items())).encode(), repr(sorted(files.items())).encode()]
            + [t.buffers[i].digest.encode() for t in artifact.tensors.values() for i in range(len(t.buffers))]
            + [_raw(data) for name in sorted(changed) for _, data in sorted(changed[name].items())]
        )
    )
    layout = lay_out(specs, shard_bytes=SHARD_BYTES)
    with ArtifactWriter(out, layout, identity, overwrite=overwrite) as writer:
        pending = writer.pending()
        with stage(progress, "writing", max(1, len(pending))) as advance:
            for spec in pending:
                tensor = artifact.tensors[spec.name]
                for key, buffer in zip(tensor.keys, tensor.buffers, strict=True):
                    data = changed.get(spec.name, {}).get(key)
                    writer.write(buffer.name, 0, artifact.read(buffer.name) if data is None else data)
                writer.complete(spec.name, exponent=tensor.exponent, t2=tensor.t2)
                advance()
        writer.publish({**{name: artifact.path / name for name in known if name != INDEX}, **files})


def _spec(tensor: StoredTensor, changed: Buffers) -> TensorSpec:
    buffers = [
        Buffer(buffer.name, buffer.dtype, tuple(changed[key].shape) if key in changed else buffer.shape)
        for key, buffer in zip(tensor.keys, tensor.buffers, strict=True)
    ]
    if unknown := changed.keys() - set(tensor.keys):
        raise WaterfillError(f"tensor {tensor.name!r} has no buffer {buffer_name(tensor.name, min(unknown))!r}")
    return TensorSpec(tensor.name, tensor.codec, tensor.shape, tensor.dtype, tuple(buffers))


def _raw(data: torch.Tensor) -> bytes:
    return bytes(data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
