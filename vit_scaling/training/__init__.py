"""How does a run go, from its config to its last checkpoint?

Start reading in loop.py: its order is the order of a run.
"""
