"""How the kernels are compiled and launched, and what all of them share: checks, operands,
arithmetic.
"""
