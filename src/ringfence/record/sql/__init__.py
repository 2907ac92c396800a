"""Schema of the audit log."""
