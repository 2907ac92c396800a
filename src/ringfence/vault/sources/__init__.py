"""Where teams keep secrets, one source a file; chosen in `ringfence.wiring`, run by the keeper."""
