"""What joins a loss to a model: its head, and what it does to the logits of it."""
