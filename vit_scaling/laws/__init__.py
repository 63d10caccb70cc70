"""Which law do measured errors follow in compute, parameters and data?

Start reading in power_law.py, the law of one variable; joint.py has the law in parameters and examples.
"""
