"""Runs: config to objects, run folders, sweeps, and a trained run in use."""
