"""From stock parameters to those that the kernels read: pure functions on tensors, and a record of
the parameters that something was made of."""
