"""What is tried: a file a family, each with its probes and the twins that must work beside them."""
