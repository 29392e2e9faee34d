"""Streams: one vocabulary over all media (``vocab``), what may stand where (``grammar``), documents (``template``) and rows (``packing``)."""
