"""How a command line becomes a config, and what to say where it does not. Knows Hydra."""
