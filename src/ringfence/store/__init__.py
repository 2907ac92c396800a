"""The one place that opens databases: SQLite files with migrations in .sql files."""
