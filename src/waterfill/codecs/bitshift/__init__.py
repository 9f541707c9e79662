"""A trellis of fixed rate, whose levels are computed from windows of bits (QTIP, arXiv 2406.11235)."""
