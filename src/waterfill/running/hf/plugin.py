"""The transformers plug-in: after `import waterfill`, `AutoModelForCausalLM.from_pretrained(artifact)` works.

transformers builds the model on the meta device, hands it over to have its modules replaced (`install`), and fills the
replaced modules' buffers like any others. Each shard says what it holds, so nothing but the files that transformers
itself resolves is needed.

Importing this module registers the plug-in. `import waterfill` has that done at the end of the import of
`transformers.quantizers`, so nothing here may need more of transformers than is there by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from waterfill.base.errors import ArtifactError
from waterfill.files.artifact import FORMAT_VERSION, lowered, read_buffer, read_shard_metadata
from waterfill.files.checkpoint import QUANT_METHOD

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """What the caller of `from_pretrained` knows. It is kept beside the call: a config.json may hold anything."""

    verified: bool = False  # the files have been checked already
    streamed: bool = False  # the caller will say where packed matrices come from
    level: int | None = None  # of an artifact that was packed at several rates; the highest when None


_ANYBODY = Caller()
_caller = ContextVar("caller of from_pretrained", default=_ANYBODY)


@contextmanager
def called_by(caller: Caller) -> Iterator[None]:
    """Artifacts that this thread loads meanwhile are loaded for `caller`."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


class WaterfillConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """`quantization_config` of an artifact's config.json, of which nothing but the version means anything."""

    def __init__(self, format_version: int = FORMAT_VERSION, **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version


class WaterfillQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads artifacts; packing is `waterfill.pack`, not `from_pretrained`."""

    requires_calibration = True  # of transformers' two kinds: it cannot quantise while loading

    def validate_environment(self, *_: Any, **__: Any) -> None:
        version = self.quantization_config.format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"the artifact has format version {version}, this waterfill reads {FORMAT_VERSION}; "
                "install the version that wrote it, or pack again"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from waterfill.running.hf.install import install, pass_by

        if not checkpoint_files:
            raise ArtifactError("a packed model is loaded from its files; a state dict alone does not describe it")
        with torch.device("cpu"):  # transformers calls this with the meta device in force
            shards = [read_shard_metadata(Path(file)) for file in checkpoint_files]
            caller = _caller.get()
            if not caller.verified:
                for shard in shards:
                    for buffer in shard.buffers:
                        read_buffer(buffer)  # compares the bytes with their digest
            stored = [tensor for shard in shards for tensor in shard.tensors]
            tensors = [lowered(tensor, caller.level) for tensor in stored]
            install(model, tensors, streamed=caller.streamed)
            read = {buffer.name for tensor in tensors for buffer in tensor.buffers}
            passed = [buffer.name for tensor in stored for buffer in tensor.buffers if buffer.name not in read]
            pass_by(model, [*passed, *(shard.guard for shard in shards if shard.guard is not None)])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from waterfill.running.hf.install import arrange
        from waterfill.running.hf.packed import PackedMatrix

        arrange(model)
        if not any(isinstance(module, PackedMatrix) for module in model.modules()):
            _compute_as_dense(model)
        model.config.quantization_config = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}

    def is_serializable(self) -> bool:
        _log.warning("save_pretrained cannot write packed weights; copy the directory that they were loaded from")
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed weights are, which transformers' Trainer asks for; the weights themselves are not."""
        return True


def _compute_as_dense(model: Any) -> None:
    """Take back the mark by which transformers' Mamba kinds compute a product of quantised models in another way, which
    rounds otherwise: a lossless model is the original one to the bit."""
    for module in model.modules():
        getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)


def register() -> None:
    """Make the plug-in known to transformers; harmless when it is known already."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(WaterfillConfig)
        register_quantizer(QUANT_METHOD)(WaterfillQuantizer)


register()
