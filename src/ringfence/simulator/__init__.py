"""A Messages API that plays scripted agents and faults, offline.

In: requests of the real `claude`, of the official client, or of anything that speaks the API.
Out: what a scenario, or a script inside the prompt itself, says. For demos, load tests, and CI
without a key.
"""
