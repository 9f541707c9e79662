"""Tests of `waterfill.tuning`."""
