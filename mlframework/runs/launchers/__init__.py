"""Launchers: where the jobs of a sweep run, and how many at a time."""
