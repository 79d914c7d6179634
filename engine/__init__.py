"""One run of training: its loop, learning rate, checkpoints and report.

Everything that the loop uses is handed to it and described in interfaces.py: the engine imports no
other room, and does not know how gradients are exchanged.
"""
