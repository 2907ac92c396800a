"""Station 2, the queue: who may try which run, and when.

In: ids of runs, with a tenant and a priority. Out: leases, one at a time for a run, each with a
number that grows. What a run is, and what came of it, lies in the store; the queue carries ids.
"""
