"""What a run leaves for people: pages, a model card, tables in the terminal."""
