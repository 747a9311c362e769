"""The menu of multi-token prediction: `scheme: x` means the file `x.py` of this folder."""
