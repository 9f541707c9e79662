"""One matrix at several rates: a trellis, and refinements of what it leaves."""
