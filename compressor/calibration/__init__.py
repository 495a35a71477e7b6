"""How much an error of each weight costs, measured on a few images, and rounding that knows it."""
