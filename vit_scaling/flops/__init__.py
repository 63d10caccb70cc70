"""What does a model cost: its parameters, FLOPs and activation memory, counted from its config.

Start reading in cost.py; each family of models has a file of its own beside it.
"""

from vit_scaling.flops.cost import Cost, count, parameters

__all__ = ["Cost", "count", "parameters"]
