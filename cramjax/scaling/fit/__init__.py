"""Fits of tables of runs: what small ones say of large ones. No jax is needed."""
