"""Benchmarks of this project against plain TRL on the same examples and settings. See `python -m bench --help`."""
