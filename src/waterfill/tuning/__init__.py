"""Models changed before they are packed, so that they lose less, or take less: checkpoints in, checkpoints out."""
