"""Honest evaluation: frozen task sets, choices on validation tasks, intervals, baselines, displays."""
