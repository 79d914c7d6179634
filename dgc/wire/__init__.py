"""What is sent, in which form: buckets of tensors, the protocol that each takes, and the bytes of a
message.

Owns: nothing that depends on a gradient, but for the message's bytes; all ranks come to the same.
"""
