"""Decodes BSON replies into columns."""
