"""What the families share: reading a config.json strictly, tables of names, rotary parameters, finding a family."""
