"""A run: prepare, train, finish; resuming, plans, the run folder."""
