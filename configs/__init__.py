"""The description of a run: its schema, the code that reads config files, and the files themselves.

A config file defines `configure(run)`, which sets values in a tree of the classes of schema.py.
"""
