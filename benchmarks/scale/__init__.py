"""How planning takes models of hundreds of billions of weights, and of a trillion."""
