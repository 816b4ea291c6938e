"""Small programs that run as they are, offline, in seconds."""
