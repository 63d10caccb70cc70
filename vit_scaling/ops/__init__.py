"""How are attention and its neighborhoods computed: pure functions of arrays?

Start reading in attention.py; local.py has the attention of a neighborhood, windows.py that of Swin.
"""
