"""Which law do measured errors follow in compute, parameters and data?

Start reading in power_law.py, the law of one variable; joint.py has the law in parameters and images, and fitting.py
what all laws share.
"""

from vit_scaling.laws.joint import JointLaw
from vit_scaling.laws.joint import fit as fit_joint
from vit_scaling.laws.power_law import Law, fit

__all__ = ["JointLaw", "Law", "fit", "fit_joint"]
