"""A trained model that answers: loaded from what `run=` names, prompted, decoded."""
