"""CuTe DSL kernels of our own that the emulator's tests run."""
