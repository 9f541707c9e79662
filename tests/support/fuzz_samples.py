"""Small sound artifacts of every kind of codec, for what follows to damage: models that the engine runs, experts, tied
heads, tensors without loss, and shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.support.models import tiny_granite_moe, tiny_llama, tiny_qwen2
from waterfill.codecs import LOSSLESS, get_codec, lossless, scale_exponent
from waterfill.files.architecture import Architecture, Kept, Matrix, describe, read_kept, read_rows
from waterfill.files.artifact import RAW, ArtifactWriter, Buffer, TensorSpec, lay_out
from waterfill.files.checkpoint import Checkpoint, open_checkpoint
from waterfill.planning.plan import kept_spec

FIXED = ("higgs-p1-n16", "higgs-p1-n11", "higgs-p2-n64", "higgs-p3-n512", "higgs-p4-n256", "higgs-p1-n3")
CODED = ("trellis-s8-r2.0000", "trellis-s64-r5.0000", "trellis-s1-r3.0000")
SIZES = {"hidden": 64, "intermediate": 96, "layers": 2}


def sample_artifacts(folder: Path) -> dict[str, Path]:
    """By what they are samples of."""
    untied, tied = tiny_llama(folder / "untied", **SIZES), tiny_qwen2(folder / "tied", tied=True, **SIZES)
    experts = tiny_granite_moe(folder / "granite", **SIZES)
    everything = [LOSSLESS]
    return {
        "fixed": pack_mixed(untied, folder / "fixed", FIXED),
        "trellis": pack_mixed(tied, folder / "trellis", CODED),
        "lossless": pack_mixed(untied, folder / "lossless", everything, kept=LOSSLESS),
        "mixed": pack_mixed(untied, folder / "mixed", [*FIXED, *CODED, RAW, LOSSLESS]),
        "experts": pack_mixed(experts, folder / "experts", [*FIXED, *CODED]),
        "shards": pack_mixed(tied, folder / "shards", [*CODED, *FIXED], kept=LOSSLESS, shard_bytes=12_000),
    }


def pack_mixed(
    checkpoint: Path, out: Path, codecs: Sequence[str], *, kept: str = RAW, shard_bytes: int = 4_000_000_000
) -> Path:
    """An artifact whose matrices take the codecs in turn, and whose other tensors are `kept`."""
    opened = open_checkpoint(checkpoint)
    tensors = dict(_encoded(opened, describe(opened), codecs, kept))
    layout = lay_out([spec for spec, _, _ in tensors.values()], shard_bytes=shard_bytes)
    mark = {"quant_method": "waterfill", "format_version": 1}
    files = {"config.json": json.dumps({**opened.config, "quantization_config": mark}).encode(), **_texts()}
    with ArtifactWriter(out, layout, "sample") as writer:
        for spec, exponent, buffers in tensors.values():
            for key, data in buffers.items():
                writer.write(f"{spec.name}.{key}" if key else spec.name, 0, data)
            writer.complete(spec.name, exponent=exponent)
        return writer.publish(files)


_Coded = tuple[TensorSpec, int, Mapping[str, torch.Tensor]]


def _encoded(
    checkpoint: Checkpoint, architecture: Architecture, codecs: Sequence[str], kept: str
) -> Iterator[tuple[str, _Coded]]:
    turn = cycle(codecs)
    for tensor in architecture.tensors:
        if isinstance(tensor, Kept):
            data = read_kept(checkpoint, tensor).contiguous()
            yield tensor.name, _exact(tensor.name, data, tensor.dtype, kept)
            continue
        weight = read_rows(checkpoint, tensor, 0, tensor.shape[0])
        codec = next(turn)
        if codec in (RAW, LOSSLESS) and tensor.expert is None:
            yield tensor.name, _exact(tensor.parameter, weight.T if tensor.transposed else weight, tensor.dtype, codec)
        else:
            yield tensor.name, _coded(tensor, weight, FIXED[0] if codec in (RAW, LOSSLESS) else codec)


def _exact(name: str, data: torch.Tensor, dtype: str, codec: str) -> _Coded:
    buffers = {"": data.contiguous()} if codec == RAW else {lossless.BUFFER: lossless.encode(data.contiguous())}
    size_bytes = sum(buffer.nbytes for buffer in buffers.values())
    return kept_spec(name, codec, tuple(data.shape), dtype, size_bytes), 0, buffers


def _coded(matrix: Matrix, weight: torch.Tensor, name: str) -> _Coded:
    codec, exponent = get_codec(name), scale_exponent(float(weight.abs().max()))
    found, layout = codec.encode(weight, exponent=exponent).buffers, codec.layout(matrix.shape)
    padded = {key: torch.zeros(part.shape, dtype=found[key].dtype) for key, part in layout.items()}
    for key, data in found.items():
        padded[key].view(-1)[: data.numel()] = data.reshape(-1)
    buffers = tuple(Buffer(f"{matrix.name}.{key}", part.dtype, part.shape) for key, part in layout.items())
    return TensorSpec(matrix.name, name, matrix.shape, matrix.dtype, buffers), exponent, padded


def _texts() -> dict[str, bytes]:
    """A tokenizer of bytes, a template and a generation config, as small as they can be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "!"}',
        "generation_config.json": b'{"bos_token_id": 0, "eos_token_id": 0, "do_sample": true, "top_k": 5}',
        "chat_template.jinja": template.encode(),
    }
