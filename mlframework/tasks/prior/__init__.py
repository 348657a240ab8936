"""Synthetic tables: generators of rows and targets, and tasks drawn from them."""
