"""sftlab's launchers, as Hydra sees them."""
