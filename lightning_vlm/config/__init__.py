"""Configuration files: found, merged, overridden, resolved, with the place where each value was written."""
