"""Meta-training: the outer loop, checkpoints, curves."""
