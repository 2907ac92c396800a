"""The platform of one host as several processes: what is started, in which order, what is started
again, and who ends last. In: settings and numbers. Out: gateways, workers, their services.

Each process is a command of ours that could be started by hand; nothing here knows what it does.
"""
