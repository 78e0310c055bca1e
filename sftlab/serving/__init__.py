"""Serving: an OpenAI-compatible server for one model, by transformers in this process or by vLLM in its own."""
