"""What stands in for the driver and the host code: launches, tensors, compiled CuTe DSL functions, CUDA sources."""
