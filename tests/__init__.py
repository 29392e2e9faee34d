"""Tests mirror the package, path for path.

``checked`` is what every annotation of mmtp is held to under pytest: beartype, with int good for float as in all of Python's typing.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
