"""PruneDM: structured channel pruning and learned N:M masks for diffusion models."""

__version__ = "0.1.0"
