"""One file for each kind of model that the engine runs: its layers, and the names of its tensors."""
