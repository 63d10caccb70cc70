"""What the process imports that starts are forked from."""

import vit_scaling.data.prepare.inputs
import vit_scaling.evaluation.suite
import vit_scaling.interop
import vit_scaling.pages.report
import vit_scaling.train
import vit_scaling.training.loop

__all__ = ["vit_scaling"]
