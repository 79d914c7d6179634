"""Horovod's side of dgc.comm: its collectives, its process sets, and when it begins and ends."""
