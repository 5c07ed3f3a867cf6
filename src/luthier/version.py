"""The version of this package: written into every run folder."""

__version__ = "0.2.0.dev0"
