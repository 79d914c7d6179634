"""Residual and velocity in 4, 2 or 1 bytes an element: one pass adds a gradient, selects, and
rounds.
"""
