"""Training what a packed model leaves to be trained: scales, norms, and adapters beside its codes.

    artifact ──load──► model ──scales, norms or adapters are parameters──► steps on a text ──► artifact, or adapter

Codes stay as they were packed, to the bit.
"""
