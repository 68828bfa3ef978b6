"""Which documents are read, in ranges."""
