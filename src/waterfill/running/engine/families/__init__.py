"""The kinds of model that the engine runs: of each, what its config.json says, in a file of its own.

A family whose layers are those of native/src/layer.cpp is no more than that: it names its norms and says what each
layer attends to, and `LlamaModel` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from waterfill.files.llama_names import LAYER_CLASSES
from waterfill.running.engine.config import Config, Fields
from waterfill.running.engine.families import gemma3, llama_config

FAMILIES: Mapping[str, Callable[[Fields], Config]] = {  # by model type
    **dict.fromkeys(LAYER_CLASSES, llama_config.read_config),
    "gemma3_text": gemma3.read_config,
}
