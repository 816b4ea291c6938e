"""What a loss may ask of a matrix of logits, and how the answers become differentiable."""
