"""Runs as jobs of SLURM: submitted with everything that they need frozen, and told of in plain words."""
