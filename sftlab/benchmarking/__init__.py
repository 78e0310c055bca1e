"""Benchmarks: generated data of the right sizes, windows of steps, the parts of a step, comparison to a baseline."""
