"""rayfwd: makes a Ray cluster work when its machines can reach each other by SSH only."""

__version__ = "0.1.0"
