"""One vocabulary over all media (``vocab``), what may stand where (``grammar``), documents (``template``), rows (``packing``)."""
