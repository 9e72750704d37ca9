"""Probes of a policy: what a step of learning does to texts it was not made for."""
