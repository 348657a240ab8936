"""Further tables about an algorithm, one file each."""
