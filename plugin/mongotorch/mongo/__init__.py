"""The MongoDB driver's facts, once: addresses, connections, errors, retries, change streams."""
