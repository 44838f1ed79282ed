"""The factory of the miniature's weights: `python -m tools.miniature_weights.make` makes what the package ships."""
