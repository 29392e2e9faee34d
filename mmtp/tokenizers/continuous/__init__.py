"""Continuous tokenizers: media to one vector per cell of a grid, under the contract of :mod:`mmtp.tokenizers.base`."""
