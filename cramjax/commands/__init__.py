"""The commands, one file for each: they parse, call and print. What needs jax is imported when a command runs."""
