"""Gradients of single rows: computed many rows at a time, turned into Adam's direction, projected at random,
and held on disk for other targets and other models.
"""
