"""The thin driver behind the `segloss` command; importing it imports nothing heavy."""
