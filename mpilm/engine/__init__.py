"""A model in training on a mesh: its stages, its optimizer, one step."""
