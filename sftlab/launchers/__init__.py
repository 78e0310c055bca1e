"""Where the points of a sweep run: processes on this machine, or jobs on SLURM. Knows no Hydra and no sweep.json."""
