"""Configurations of other tools as recipes: LLaMA-Factory, axolotl, ms-swift and TRL.

Each tool has a file with one table, KEYS: what becomes of each of its keys, and one of its own defaults,
which are written into the recipe where luthier's differ. draft.py has what tables are made of,
training_arguments.py the keys that come from transformers, read.py the files, convert.py puts them together.
"""
