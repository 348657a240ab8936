"""Meta-Gradient-Descent: MAML and its relatives."""
