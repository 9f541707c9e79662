"""Models on disk: checkpoints, what transformers makes of them, settings, artifacts. Stands on base and codecs."""
