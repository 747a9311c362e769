"""The menu of attention schemes: `scheme: x` in a layer plan means the file `x.py` of this folder."""
