"""`python -m waterfill`: the command line, of this interpreter."""

from waterfill.cli.main import main

if __name__ == "__main__":
    main()
