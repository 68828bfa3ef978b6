"""BSON replies to columns."""
