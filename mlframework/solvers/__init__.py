"""Solvers: batched over tasks, and pure."""
