"""sftlab: supervised fine-tuning of Hugging Face causal language models, and sweeps of it that end in an answer."""

__version__ = "0.1.0"
