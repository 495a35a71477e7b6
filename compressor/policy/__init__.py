"""Which tensor gets which scheme, and in which stage of a recipe."""
