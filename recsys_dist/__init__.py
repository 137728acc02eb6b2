"""Nightly batch trainer for recommender systems: raw interaction logs in, explained top-K lists out."""

__version__ = "0.1.0"
