"""Where the rooms meet."""
