"""Models that do not fit in memory, beside the device's own speed and beside peers."""
