"""Where do arrays lie, and how do the processes of a run work together?

Start reading in sharding.py, whose table maps parameter paths to mesh axes.
"""
