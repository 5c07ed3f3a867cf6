"""The fast paths, each a file with a plain twin that it is checked against on the first batch of every
run.
"""
