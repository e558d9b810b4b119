"""Releases: ``python -m release.wheel`` builds the files, ``python -m release.compat`` tests them everywhere."""
