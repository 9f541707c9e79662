"""An artifact as a model that the engine runs: in memory, or streamed within a limit.

path ──► Spec ──► norms and biases, float32 ──┬── Resident ──┬──► LlamaModel
                                              └── Streamed ──┘
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from waterfill.base import native
from waterfill.base.arguments import CacheBits, cache_bits
from waterfill.base.errors import UnsupportedError
from waterfill.codecs import lossless
from waterfill.files.artifact import RAW, Artifact, at_level, open_artifact, read_bytes
from waterfill.running.engine.families.llama import LlamaModel, working
from waterfill.running.engine.families.llama_spec import EMBEDDING, PROJECTIONS, Spec, read_spec
from waterfill.running.engine.weights import Floats, Resident, Streamed
from waterfill.running.streaming.fit import Fit, Form, fit, fitting_level, packed_names
from waterfill.running.streaming.limit import LEAST_CONTEXT, LEAST_PASS, Limit
from waterfill.running.streaming.storage import Storage
from waterfill.running.streaming.tuning import USUAL, Tuning
from waterfill.running.streaming.within import open_streamer

OVERHEAD_BYTES = 12 << 20  # what the interpreter and the C library take beyond what is counted


def open_model(
    artifact: str | Path | Artifact,
    *,
    memory: str | float | None = None,
    memory_form: Form = "auto",
    rate: float | None = None,
    streamed: bool | None = None,
    verify: bool = True,
    logits: int = 1,
    tuning: Tuning = USUAL,
    kv: CacheBits = None,
) -> LlamaModel:
    """The packed model, without torch and transformers; the arguments are those of `waterfill.load`, and `kv` is that
    of `Engine`.

    Of an artifact that is open already, all files but the shards are the caller's to verify.

    Raises:
        UnsupportedError: a model that takes transformers, or no native library; says why.
        ArtifactError: torn, altered or of an unknown version.
        WaterfillError: `memory` is not a size, or too small for the model even when it is streamed.
    """
    if not isinstance(artifact, Artifact):
        artifact = open_artifact(Path(artifact), verify=False)
        if verify:
            artifact.verify_files()
    check_library()
    spec = read_spec(artifact)
    bits = cache_bits(kv)
    texts = working(spec, bits)
    context = min(LEAST_CONTEXT, spec.positions)
    least = OVERHEAD_BYTES + texts.text_bytes(context) + texts.pass_bytes(LEAST_PASS, context, logits)
    sizes = {"working_bytes": least, "loading_bytes": max(t.size_bytes for t in artifact.tensors.values())}
    artifact = at_level(artifact, fitting_level(artifact, rate, memory, streamed, memory_form, **sizes))
    chosen = fit(artifact, memory, streamed, memory_form, **sizes)
    packed = packed_names(artifact)
    vectors = {name: _floats(artifact, name, verify) for name in artifact.tensors if name not in packed}
    if spec.norm_offset:  # of a family without biases
        vectors = {name: vector + np.float32(spec.norm_offset) for name, vector in vectors.items()}
    if chosen.streamed:
        return _streamed(artifact, spec, vectors, chosen, verify=verify, logits=logits, tuning=tuning, bits=bits)
    limit = Limit(
        artifact.path,
        chosen.limit_bytes,
        texts,
        overhead_bytes=OVERHEAD_BYTES,
        binding=chosen.binding,
        pass_bytes=tuning.pass_bytes,
    )
    width = texts.widest(min(tuning.pass_bytes, chosen.spare_bytes // 4), context)
    weights = Resident.load(artifact, spec, verify=verify)
    return LlamaModel(spec, weights, vectors, pass_tokens=width, limit=limit, bits=bits)


def check_library() -> None:
    """Raises UnsupportedError where there is no native library, or it is not to be used; says why."""
    if native.isa() is None:
        raise UnsupportedError(f"the native library is not used: {native.why_not()}")
    if native.float_activations():
        raise UnsupportedError(f"{native.FLOAT_ACTIVATIONS} asks for exact activations")


def _floats(artifact: Artifact, name: str, verify: bool) -> Floats:
    """A tensor that was kept, as float32."""
    tensor = artifact.tensors[name]
    data = read_bytes(tensor.buffers[0], verify=verify)
    if tensor.codec == RAW:
        return lossless.floats(data, tensor.dtype).reshape(tensor.shape)
    return lossless.decode_floats(data, tensor.shape, tensor.dtype)


def _streamed(
    artifact: Artifact,
    spec: Spec,
    vectors: dict[str, Floats],
    chosen: Fit,
    *,
    verify: bool,
    logits: int,
    tuning: Tuning,
    bits: tuple[int, int],
) -> LlamaModel:
    texts, storage = working(spec, bits), Storage()
    try:
        matrices = {
            name: tuning.matrix(artifact.tensors[name], storage, verify=verify) for name in packed_names(artifact)
        }
        order = [f"model.layers.{layer}.{name}" for layer in range(spec.layers) for name in PROJECTIONS.values()]
        order.append(spec.head)
        streamer = open_streamer(
            artifact.path,
            storage,
            [matrices[name] for name in order],
            [matrices[EMBEDDING]] if spec.head != EMBEDDING else [],
            chosen,
            texts,
            overhead_bytes=OVERHEAD_BYTES,
            context=spec.positions,
            logits=logits,
            verify=verify,
            tuning=tuning,
        )
    except BaseException:
        storage.close()
        raise
    limit = Limit(
        artifact.path,
        chosen.limit_bytes,
        texts,
        overhead_bytes=OVERHEAD_BYTES,
        streamer=streamer,
        binding=chosen.binding,
        pass_bytes=tuning.pass_bytes,
    )
    return LlamaModel(
        spec,
        Streamed(streamer, matrices, spec),
        vectors,
        pass_tokens=texts.widest(tuning.pass_bytes, LEAST_CONTEXT),
        streaming=streamer,
        limit=limit,
        bits=bits,
    )
