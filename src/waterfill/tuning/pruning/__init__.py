"""Structural pruning: heads, channels or layers of a checkpoint are left out, and what is left is a smaller one."""
