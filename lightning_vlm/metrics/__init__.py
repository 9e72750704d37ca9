"""Metrics: pure functions on texts and tensors, and thin torchmetrics classes."""
