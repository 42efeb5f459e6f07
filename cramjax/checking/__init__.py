"""`cramjax check`: is what this machine computes right, and how fast is it?"""

from cramjax.checking.check import Check, check

__all__ = ["Check", "check"]
