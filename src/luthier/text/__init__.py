"""From rows to tokens: chat templates, encoding, the token store."""
