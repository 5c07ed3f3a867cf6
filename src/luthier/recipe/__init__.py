"""From YAML to a checked recipe: keys, aliases of other tools, validation before any compute."""
