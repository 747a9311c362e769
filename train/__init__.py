"""The one floor where model, parallelism and data meet: one run."""
