"""Serving: an OpenAI-compatible server for one model, in this process (transformers) or in one of its own (vLLM)."""
