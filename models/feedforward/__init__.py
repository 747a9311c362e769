"""The menu of feed-forwards: `scheme: x` means the file `x.py` of this folder."""
