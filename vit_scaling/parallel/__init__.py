"""Where do arrays live: meshes, the one table of sharding rules, processes and their signals?

Start reading in sharding.py, whose table maps parameter paths to mesh axes.
"""
