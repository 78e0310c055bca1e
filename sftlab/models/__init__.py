"""Models: loading (load), what each supports (architecture), masks (attention), the loss (scorer), a check (probe)."""
