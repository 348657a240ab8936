"""Ratings: one task is one user, or one item."""
