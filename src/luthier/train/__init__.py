"""The training loop: loss closure, optimizer chain, checks, memory, caches."""
