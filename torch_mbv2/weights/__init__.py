"""From stock parameters to those that the kernels read: pure functions on tensors."""
