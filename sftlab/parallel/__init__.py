"""How the model is spread over ranks, and which rank this process is."""
