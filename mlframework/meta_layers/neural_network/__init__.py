"""Meta-Neural-Network: a network reads the support features and emits the task's model."""
