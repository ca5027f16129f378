"""Pure functions of arrays: no flax, no config objects, no I/O."""
