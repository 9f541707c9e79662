"""What is measured, and how: one question a script, `python -m benchmarks.NAME` (README.md has the list)."""
