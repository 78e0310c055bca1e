"""What every room may use: the run directory, files, metrics, secrets, the hub, words."""
