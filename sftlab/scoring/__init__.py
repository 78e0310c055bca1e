"""Scores of a model on labelled examples: one line per example, averages with intervals, scores.json."""
