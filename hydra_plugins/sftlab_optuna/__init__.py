"""sftlab's search, as Hydra sees it."""
