"""Meta-SVM: a task's model is the optimum of a convex problem on its support features."""
