"""Makes a packed model produce text or logits: with transformers (hf), without (engine), from storage (streaming)."""
