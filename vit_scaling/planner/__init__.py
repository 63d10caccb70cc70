"""Will a run fit a machine that is not here, and how fast can it be?

Start reading in plan.py, which compiles the training step for the described devices.
"""
