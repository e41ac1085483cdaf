"""The package's version, below everything that names it."""

__version__ = "0.3.0"
