"""Audio tokenizers: strided convolutions (conv), one spectrum per frame (frame), and the streams of both."""
