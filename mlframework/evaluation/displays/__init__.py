"""Figures, texts and curves of validations for TensorBoard, one file each."""
