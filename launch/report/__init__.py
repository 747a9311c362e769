"""Runs compared: read (record), measured (quantities), set side by side (compare), drawn (plots), written (pages)."""
