"""Models and held-out events to metrics and a report."""
