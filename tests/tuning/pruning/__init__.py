"""Tests of `waterfill.tuning.pruning`."""
