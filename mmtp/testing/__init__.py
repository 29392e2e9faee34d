"""Checks for tokenizers, models and zoo entries, the library's own and yours.

``check_tokenizer(tokenizer, media)`` holds a tokenizer to every promise of :mod:`mmtp.tokenizers.base`, ``check_head(config)`` a head to
those of :mod:`mmtp.models.heads.base`; ``check_zoo_entry(folder)``
loads a saved folder, reads its card and recipe, and reproduces its golden file.
"""

from mmtp.testing.conformance import ConformanceError, check_tokenizer, check_zoo_entry
from mmtp.testing.golden import Golden, model_golden, read_golden, tokenizer_golden, write_golden
from mmtp.testing.heads import check_head

__all__ = [
    "ConformanceError",
    "Golden",
    "check_head",
    "check_tokenizer",
    "check_zoo_entry",
    "model_golden",
    "read_golden",
    "tokenizer_golden",
    "write_golden",
]
