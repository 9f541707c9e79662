"""A model's small files, checked where they are read: choices, chat templates, tokenizers, conversations."""
