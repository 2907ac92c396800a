"""Station 4, the sandbox: the place in which `claude` and its tools run.

In: a `SandboxSpec` (the compiled profile and the paths of this run). Out: processes with their
stdio on a socketpair, files copied in and out, a patch, and the proof that nothing is left alive.
"""
