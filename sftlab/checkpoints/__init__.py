"""The state of a run on disk: saved and restored over any number of ranks, checked, exported."""
