"""Files of a run: where they lie, how they are written whole, how a failure is recorded."""
