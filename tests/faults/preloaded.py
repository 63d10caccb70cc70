"""What the process imports and reads that starts are forked from. It must not start JAX's devices: their threads would
not be there in a fork.
"""

import matplotlib.figure

import vit_scaling.data.prepare.inputs
import vit_scaling.evaluation.suite
import vit_scaling.interop
import vit_scaling.pages.report
import vit_scaling.train
import vit_scaling.training.loop
from vit_scaling.data.sources import arrays

arrays._builtin_splits()

__all__ = ["matplotlib", "vit_scaling"]
