"""Publishing: a run's model as a repository on the Hugging Face Hub, with a card that says where it comes from."""
