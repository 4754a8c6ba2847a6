"""The package's version, in a module that a build can read without what the package needs."""

__version__ = "0.1.0"
