"""The way of a model from its plan to the packed file."""
