"""Beside the road: credentials at rest. Anyone may seal a value; only egress opens one.

In: a value, sealed to the egress process's public key. Out: redacted twins for everybody, and
values for egress alone.
"""
