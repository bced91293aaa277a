"""Faults planted one at a time to measure the tests: `python -m tests.mutation`."""
