"""Options of packages installed beside sftlab, as Hydra finds them."""
