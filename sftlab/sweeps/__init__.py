"""A sweep of runs: its record, its points, their ranking, the report, the search."""
