"""`segloss compare`: whether an option of training makes a difference, over seeds and items."""
