"""Which images does step s see, and how do they reach the devices?

Start reading in loader.py; sources/ opens data sets, images/ decodes and augments, prepare/ writes new sets.
"""
