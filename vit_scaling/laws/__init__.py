"""Which law do measured errors follow in compute, parameters and data?

`fit` is the law of error in compute and the place to start reading (power_law.py). `fit_joint` is the law in parameters
and images (joint.py), and with `unique` the one of images seen repeatedly (repeated.py); budget.py holds what these two
say of a compute budget. `fit_curve` is the learning curve of one model (curve.py). `save` and `load` keep laws in
files, and fitting.py holds what all laws share.
"""

from vit_scaling.laws.curve import CurveLaw
from vit_scaling.laws.curve import fit as fit_curve
from vit_scaling.laws.files import load, save
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.joint import fit as fit_joint
from vit_scaling.laws.power_law import Law, fit
from vit_scaling.laws.repeated import RepeatedLaw

__all__ = ["CurveLaw", "JointLaw", "Law", "RepeatedLaw", "fit", "fit_curve", "fit_joint", "load", "save"]
