"""Adds configs/ to the package as `vit_scaling.configs`; everything else is in pyproject.toml.

An installed package so has `--config=vit_imagenet:S/16` without a checkout, and no top-level package named `configs`,
which others may have too.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vit_scaling*"]), "vit_scaling.configs", "vit_scaling.pages.web"],
    package_dir={"vit_scaling.configs": "configs"},
)
