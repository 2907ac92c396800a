"""Schema of the limits in SQLite."""
