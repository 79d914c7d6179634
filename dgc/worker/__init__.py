"""One rank's own part of a step, from a gradient's elements to the residual that keeps what is not
sent.

Owns: residual and velocity, the statistics that a worker keeps, scaling and clipping, row-sparse
gradients, and the figures of a step. Nothing here talks to other ranks.
"""
