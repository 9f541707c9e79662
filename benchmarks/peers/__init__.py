"""Other libraries' kernels, each in a process of its own."""
