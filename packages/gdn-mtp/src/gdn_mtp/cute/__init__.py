"""CuTe DSL kernels of the gated delta rule; `gdn_mtp.cute_provider` registers them without importing this."""
