"""Schema of the transcripts."""
