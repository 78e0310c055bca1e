"""Models: load or initialise (load), which token sees which (attention), by blocks on a CPU (blocks), hidden states to loss (scorer)."""
