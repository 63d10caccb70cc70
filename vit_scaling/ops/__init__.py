"""How are attention and its neighbourhoods computed: pure functions of arrays?

Start reading in attention.py; local.py has the attention of a neighbourhood, windows.py that of Swin.
"""
