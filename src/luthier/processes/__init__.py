"""Several processes that train together: how they are started and refused (launcher), how they add up and
fail together (group), and how each learns that another one has ended (lifeline).
"""
