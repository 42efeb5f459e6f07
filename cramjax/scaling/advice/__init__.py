"""What to train with a budget, from a fit: a size, and the whole run."""
