"""Codes for ternary matrices that take less than a bit a weight: QMoE's dictionary, and an entropy code for files."""
