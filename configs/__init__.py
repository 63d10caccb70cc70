"""Which experiments are there? One file for each; `get_config(arg)` returns its typed config.

Start reading in smoke.py. In a checkout `from configs import vit_imagenet` works; an installed package has the same
files as `vit_scaling.configs`.
"""
