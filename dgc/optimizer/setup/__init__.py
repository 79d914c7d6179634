"""What is checked, and taken over from the wrapped optimizer, when a DistributedOptimizer is made.
"""
