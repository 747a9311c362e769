"""Runs compared: read (record, validation), measured (quantities, heldout), set side by side (compare), drawn (plots/),
said (tables, missing, content) and written down (written, page)."""
