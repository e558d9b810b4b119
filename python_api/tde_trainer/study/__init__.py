"""Small studies of what the paper claims, each one command that writes its own page."""
