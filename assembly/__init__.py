"""Put a run together: build the parts that its description names, and hand them to each other.

parts.py builds the trainer, data.py its data, agreement.py refuses ranks that were given different
things; memory_report.py has the memory of the run predicted. This is the one room that imports all
others, and only train.py imports it.
"""
