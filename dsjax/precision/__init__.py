"""Low-precision number formats of the released models."""
