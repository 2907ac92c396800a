"""1, the gateway: the way in. In: HTTP requests of callers with an API key. Out: rows of the
platform's store, through the rules of `control`, and answers in the public shapes.

No business rules: a file here knows paths, headers, statuses and shapes of the wire.
"""
