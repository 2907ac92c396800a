"""Shared limits of what a fleet asks of models: rates with their queue, and budgets.

In: what a request will take, whose it is, and what the provider said of the last one. Out: now, or
how long it waits and at which place; and whether a budget still holds it. `lane`, `budget`,
`estimate` and `provider` are PURE; the stores keep the same state for one process, one host, or
many.
"""
