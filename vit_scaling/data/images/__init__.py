"""How does an encoded image become the pixels that a model is fed?

Start reading in transforms.py; codec.py decodes.
"""
