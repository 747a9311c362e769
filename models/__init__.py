"""Plain single-device models: mechanisms, one a file, joined by the contract in `models.contract`."""
