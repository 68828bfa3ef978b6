"""From a trainer to a published version."""
