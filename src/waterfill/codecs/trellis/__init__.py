"""Trellis-coded quantisation: the code, the codec, its entropy-coded streams, and the measured curves of its loss."""
