"""Models: load or initialise (load), which token sees which (attention, blocks), hidden states to loss (scorer)."""
