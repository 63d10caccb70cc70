"""What did a run do, and where does a model look? One HTML file answers each, and asks nothing of any network.

Start reading in page.py, which puts a page together; attention.py and report.py collect what two of them show.
"""
