"""Service level objectives: what counts, what is left of an error budget, when somebody is told.

Pure: no clock, no database. Counts come in, standings and moves of alerts go out.
"""
