"""Schedules: registered, watched, fired, trained, judged by their gate."""
