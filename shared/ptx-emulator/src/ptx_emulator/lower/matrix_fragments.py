"""Matrix fragments between shared memory and registers."""
