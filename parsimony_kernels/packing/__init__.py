"""Entries to a message's words and back, and the sum of several messages' entries."""
