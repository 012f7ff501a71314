"""Training Video-XL: the recipe, its data, and VICO."""
