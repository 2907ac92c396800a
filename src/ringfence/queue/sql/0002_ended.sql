-- Runs that have ended, in the order in which they are forgotten; dead letters are kept for longer.
CREATE INDEX run_ended ON run (dead, changed)
WHERE status IN ('succeeded', 'failed', 'cancelled', 'expired');
