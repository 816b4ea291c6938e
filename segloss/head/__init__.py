"""The engine of a linear head: statistics and gradients of `hidden @ weight.T`, never stored."""
