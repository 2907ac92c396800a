"""Beside the road: what is allowed. PURE.

In: one policy document (YAML). Out: `CompiledPolicy`, decisions, findings, differences.

`load` reads, `document` and `validate` refuse what is vague, `compile` derives every enforcement
point's rules from the one source, `decide` answers questions about them; `lint`, `explain` and
`diff` are for people. What a Bash command's text says is advice only (`shell`): the sandbox, the
proxy and the mount table are what hold.
"""
