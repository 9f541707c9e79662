"""What the scripts share: reports, timing, limits, models."""
