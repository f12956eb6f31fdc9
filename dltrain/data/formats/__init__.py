"""What samples are read from and written to: a module per format, and :mod:`opening`, which finds the one that fits.

from dltrain.data.formats.opening import open_source
for key, fields in open_source("photos/").read(0, 10): ...
"""
