"""What lies between a run's description and the rooms that carry it out.

parts.py builds a run's parts from its config; memory_report.py makes a job of it whose memory is
foretold. The one room that knows all others; only train.py imports it.
"""
