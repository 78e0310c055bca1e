"""Data flows one way: source -> format -> render -> plan -> forest -> batch, one module per word."""
