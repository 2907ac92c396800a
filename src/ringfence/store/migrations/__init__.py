"""Alembic's place: `env.py` and one file a revision."""
