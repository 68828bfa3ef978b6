"""The training stream: windows, order, batches, position."""
