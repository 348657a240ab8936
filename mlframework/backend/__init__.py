"""How steps are made fast. Nothing here is needed to understand an algorithm."""
