"""Samples, sources, encoding, loading."""
