"""A sweep: many runs of one family, each a process of its own, and the table of what came of them."""
