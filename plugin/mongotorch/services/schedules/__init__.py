"""Schedules at work: registered, watched, fired, and run through their gate."""
