"""Perplexity and tasks beside the figures of llama.cpp and lm-evaluation-harness."""
