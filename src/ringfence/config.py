"""Settings, read once into a frozen value: environment (`RINGFENCE_…`), then the operator's file.

The operator's settings are trusted; a policy or a workspace never sets anything here. Only here
may an upstream be plain http or on loopback.
"""
