"""Inference with a trained model: find what `run=` names, load it, prompt it, decode its answers."""
