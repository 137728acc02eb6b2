"""Models to top-K lists, published."""
