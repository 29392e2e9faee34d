"""Where samples come from: a folder, a manifest, archives, tables, the Hub, or a data set that ships as a package.

A source is indexed once (names, sizes and places of all inputs; nothing is decoded) and then read at random, so that any
worker can do any part of it.
"""

from mmtp.data.sources.base import Item, Sample, Source
from mmtp.data.sources.find import open_source

__all__ = ["Item", "Sample", "Source", "open_source"]
