"""Entropy-coded trellis quantisation beside the Shannon bound."""
