"""`waterfill doctor`: what this machine and installation do, tried on a tiny model."""
