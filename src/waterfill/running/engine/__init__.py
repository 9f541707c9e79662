"""Running a packed model without torch and transformers, which cost seconds and memory before the first token.

engine           `Engine`: all that follows, for one artifact
opening          an artifact as a model, in memory or streamed
spec             what a model of the Llama kind is, from its files
llama            `LlamaModel`: all layers of a pass in one native call
weights          what a pass multiplies with, in memory or streamed
generation       `generate`: pieces of text from a model, a tokenizer and a prompt
model            what is asked of a model (`TokenModel`), and reading only what its cache does not hold
speculate        drafts, and their verification
choose           the next token from logits
defaults         what a model's generation_config.json says of that
text             ids of prompts and conversations, text of ids that come one by one
tokenizer_files  a tokenizer from its files
template         chat templates

What the engine does not cover is `UnsupportedError`; transformers does it.
"""
