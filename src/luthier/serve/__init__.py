"""What a tuned model is used for: chat, comparison with its base, export."""
