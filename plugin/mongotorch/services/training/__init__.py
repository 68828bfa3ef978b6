"""Runs of trainers: from a claimed job to a published version."""
