"""How good is a model: accuracy, few-shot accuracy, calibration and confusions of any parameters on any set?

Start reading in suite.py, which runs every evaluator that a config names.
"""
