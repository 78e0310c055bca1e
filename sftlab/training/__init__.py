"""A run from start to end: built from its config, trained step by step, validated, stopped in good order."""
