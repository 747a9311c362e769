"""What `python -m models` does, a command a file: `run(arguments)`, which prints and raises Refused."""
