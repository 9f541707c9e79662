"""Speed of the native kernels; `kernel_speed.py` is the script.

Nothing may happen here on import: transformers looks for a package of this name, and finds this file when a script in
this folder runs.
"""

if __name__ == "__main__":
    from benchmarks.kernels.speed import main

    main()
