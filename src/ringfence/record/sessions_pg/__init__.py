"""Schema of the transcripts in PostgreSQL."""
