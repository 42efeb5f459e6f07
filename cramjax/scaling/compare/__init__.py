"""Two recipes against each other, seed by seed."""
