"""Schema and statements of the embedded queue."""
