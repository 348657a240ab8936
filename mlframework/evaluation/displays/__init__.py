"""What people see of a training in TensorBoard, one file each."""
