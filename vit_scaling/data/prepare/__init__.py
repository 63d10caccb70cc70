"""How are folders, tar shards and IDX files turned into a prepared set of ArrayRecord shards?

Start reading in job.py, which plans, writes and resumes a set.
"""
