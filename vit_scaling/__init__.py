"""Vision transformers and local attention at scale, in JAX."""

__version__ = "0.1.0"
