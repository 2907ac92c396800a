"""Station 6, the record: the audit log, transcripts, usage.

In: events of `ringfence.record.events` from worker and egress. Out: a Merkle log that anyone
with its public key can verify, transcripts that a session resumes from, usage per run.
"""
