"""What stands in for driver and host code: launches, arrays, compiled CuTe DSL functions, CUDA sources."""
