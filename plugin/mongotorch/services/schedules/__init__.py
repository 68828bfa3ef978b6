"""Schedules at work."""
