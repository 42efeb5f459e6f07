"""How things look, whatever they are: numbers in words, tables, live displays, figures. It imports nothing of CramJAX.

A value does not draw itself: the module `show` (or `display`, `plots`) beside it builds a view of what stands here.
"""
