"""Station 5, egress: the only way out, a process of its own.

In: bytes from a sandbox, over its unix socket or the listener in its network namespace. Out:
requests to what its rules grant, with the credential set last; a record of every decision.
"""
