"""Schema and functions of the limits in PostgreSQL."""
