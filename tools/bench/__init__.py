"""Ours against a peer, side by side in one run: `python -m tools.bench --suite cpu --against trl`."""
