"""How are many runs planned, run and compared: scaling studies and sweeps over fields of a config?

Start reading in scaling.py, which plans a study; runner.py runs what it plans.
"""
