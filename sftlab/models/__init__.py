"""Models: loading (load), attention masks (attention, blocks), the loss (scorer) and a start-up check (probe)."""
