"""Published versions: loading, publishing, promotion."""
