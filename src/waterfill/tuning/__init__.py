"""Parts of a checkpoint left out, and training of what a packed model leaves to be trained.

    checkpoint ──pruning──► smaller checkpoint, which is packed like any other
    artifact ──load──► model ──scales, norms or adapters are parameters──► steps on a text ──► artifact, or adapter

Codes stay as they were packed, to the bit.
"""
