"""Damaged streams through every decoder."""
