"""Models: load or initialise (load), which token sees which (attention), hidden states to loss (scorer)."""
