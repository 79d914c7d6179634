"""Turns entries into a message and back, and adds up the entries of several messages."""
