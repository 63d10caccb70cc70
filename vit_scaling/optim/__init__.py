"""How do gradients become updates: losses, optimizers and learning-rate schedules?

Start reading in optimizer.py, which builds the optimizer of a config.
"""
