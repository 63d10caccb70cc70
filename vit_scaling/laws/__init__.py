"""Which law do measured errors follow in compute, parameters and data?

`fit` is the law of error in compute and the place to start reading (power_law.py). `fit_joint` is the law in parameters
and images (joint.py), `fit_repeated` that of images seen repeatedly (repeated.py), `fit_curve` the learning curve of
one model (curve.py), and fitting.py holds what all laws share.
"""

from vit_scaling.laws.curve import CurveLaw
from vit_scaling.laws.curve import fit as fit_curve
from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.joint import fit as fit_joint
from vit_scaling.laws.power_law import Law, fit
from vit_scaling.laws.repeated import RepeatedLaw
from vit_scaling.laws.repeated import fit as fit_repeated

__all__ = ["CurveLaw", "JointLaw", "Law", "RepeatedLaw", "fit", "fit_curve", "fit_joint", "fit_repeated"]
