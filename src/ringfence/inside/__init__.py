"""What runs within a sandbox: standard library only, nothing of ours is imported.

In: frames from the host over one port. Out: a program's stdio and its end, and streams to egress.
`guest` is process 1 of a virtual machine; `mux` is the protocol, which both ends use.
"""
