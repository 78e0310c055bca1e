"""What happens in a run: built from its config, trained step by step, validated, stopped in good order."""
