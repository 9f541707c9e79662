"""What is measured, and how: one question a script, `python -m benchmarks.NAME` (README.md has the list).

Plans are made without error feedback here, unless a script asks for it: what is asked of allocation, of a codec or of a
kernel has the same answer, sooner. `benchmarks.calibrated` measures feedback.
"""

import os

os.environ.setdefault("WATERFILL_FEEDBACK", "none")
