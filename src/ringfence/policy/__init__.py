"""Beside the road: what is allowed. PURE.

In: one policy document (YAML). Out: `CompiledPolicy`, decisions, findings, differences.
"""
