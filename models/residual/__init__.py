"""The menu of residual schemes: `scheme: x` means the file `x.py` of this folder."""
