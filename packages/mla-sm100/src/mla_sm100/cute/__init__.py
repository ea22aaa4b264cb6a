"""The kernels, in CuTe DSL; imported only where one is compiled."""
