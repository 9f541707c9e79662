"""How far quantised weights can be compressed, and by what."""
