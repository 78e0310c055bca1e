"""Estimates: what a run needs in memory, time, money and disk, from its config alone, before anything is loaded."""
