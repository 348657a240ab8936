"""Other predictors made of a trained algorithm, whose settings validation tasks choose."""
