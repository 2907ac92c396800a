"""The proof: in come a policy, a host and an isolation; out go findings, a report, an exit status.

Beside the road and on top of it, because a probe is only worth something against the real
recorder, the real egress process and a real sandbox. `finding` and `judge` decide and are pure;
`place` builds what is attacked; `probes/` holds what is tried; `run` brings them together.
"""
