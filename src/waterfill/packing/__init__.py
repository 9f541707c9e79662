"""Carries a plan out: tensors become an artifact, and settings in it may be changed. Stands on planning."""
