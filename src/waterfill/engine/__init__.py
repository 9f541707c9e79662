"""Running a packed model without torch and transformers, which cost seconds and 230 MB before the first token.

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
