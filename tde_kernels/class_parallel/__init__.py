"""Classes shared out over ranks."""
