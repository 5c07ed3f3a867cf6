"""luthier's methods in code that is not luthier's: tuners in transformers.Trainer, in TRL and in plain loops,
and objectives as their loss functions.
"""
