"""From every rank's entries to the update that all agree on.

Owns: the order in which buckets leave, the protocols by which they travel, and the undoing of a
step in which any rank's gradient cannot be used.
"""
