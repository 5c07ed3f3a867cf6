"""Reproduce a paper's claim: what it reports of a method, tried on small models over several seeds, with an
interval.

A claim is a file, benchmarks/claims/NAME.yaml. Its arms are recipes; where an arm lists learning rates,
a run with a seed that is not reported picks one of them. Then every arm runs with every test seed: the
same rows in the same order for all arms, other rows and another order for the next seed. What is judged
is the difference of two arms, paired by seed, by Student's t interval of its mean at 95 %; with three
seeds a percentile bootstrap is too narrow to judge by, so it is only printed beside it.

`spec.py` reads and checks the files, `run.py` runs them, `judge.py` compares intervals with what was
expected, `page.py` writes docs/claims.md from benchmarks/claims/results/NAME.json. Nothing here imports
a network before something is run.
"""
