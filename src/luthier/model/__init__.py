"""From a checkpoint to a network that is read and written: loading, batches, layouts, outputs, generation."""
