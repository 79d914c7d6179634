"""Which entries of a residual are sent: how many, above which threshold.

Owns: the plan of a tensor's selection, the threshold that is steered from step to step, and the
histogram that it is steered by. Nothing here talks to other ranks.
"""
