"""Running a packed model without torch and transformers, which cost seconds and memory before the first token.

engine           `Engine`: all that follows and what it says, for one artifact
opening          an artifact as a model, in memory or streamed
config, families what a model is by its config.json, and `LlamaModel`: all layers of a pass in one native call
cache            `Sequence`, a text that a model reads, and what is remembered of it
weights          what a pass multiplies with, in memory or streamed

Prompts, tokens and texts are `running.text`'s.

What the engine does not cover is `UnsupportedError`; transformers does it.
"""
