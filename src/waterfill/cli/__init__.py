"""The commands, on top of everything: options in, words and JSON out."""
