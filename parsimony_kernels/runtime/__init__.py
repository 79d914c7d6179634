"""How the kernels are compiled, launched and chosen, and what all of them share: arithmetic,
operands and their checks, and the structures that Python hands over (abi.h).
"""
