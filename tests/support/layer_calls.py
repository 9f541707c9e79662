"""What decoder layers are called with beside the hidden states, by versions of transformers."""

from __future__ import annotations

LAYER_CALLS: dict[str, tuple[str, ...]] = {
    "5.0 to 5.3": ("attention_mask", "position_ids", "past_key_values", "use_cache", "cache_position"),
    "5.4 to 5.23": ("attention_mask", "position_ids", "past_key_values", "use_cache"),
    "from 5.24": ("attention_mask", "position_ids", "cache", "use_cache"),
}
