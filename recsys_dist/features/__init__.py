"""Raw logs to point-in-time features. pyspark only."""
