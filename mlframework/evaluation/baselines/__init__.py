"""Methods that an evaluation judges beside the trained algorithm, one file each."""
