-- What the embedded queue asks of its file, by name. A test reads the plan of each: none may walk
-- the runs. `:now` is SQLite's own clock, asked for in the same transaction.

-- name: now
-- Milliseconds since the epoch.
SELECT CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER);

-- name: add_tenant
INSERT INTO tenant (name) VALUES (:tenant) ON CONFLICT DO NOTHING;

-- name: add_lane
INSERT INTO lane (tenant, priority, open)
SELECT name, :priority, cap IS NULL OR held < cap FROM tenant WHERE name = :tenant
ON CONFLICT DO NOTHING;

-- name: add_run
INSERT INTO run (id, tenant, priority, status, submitted, changed)
VALUES (:run, :tenant, :priority, :status, :now, :now)
ON CONFLICT (id) DO NOTHING;

-- name: limit_tenant
INSERT INTO tenant (name, cap) VALUES (:tenant, :cap) ON CONFLICT DO UPDATE SET cap = excluded.cap;

-- name: limits
SELECT name, cap, held FROM tenant WHERE cap IS NOT NULL ORDER BY name;

-- name: find
SELECT id, tenant, priority, status, attempt, failures, dead, reason, submitted, changed, worker,
       cancelling
FROM run WHERE id = :run;

-- name: attempts
SELECT run, number, worker, status, started, ended FROM attempt WHERE run = :run ORDER BY number;

-- name: add_worker
INSERT INTO worker (id) VALUES (:worker);

-- name: beat
UPDATE worker SET beat = beat + 1 WHERE id = :worker;

-- name: is_worker
SELECT 1 FROM worker WHERE id = :worker;

-- name: workers
SELECT id, beat FROM worker;

-- name: remove_silent
-- Only if it has not beaten since it was seen to stand still.
DELETE FROM worker WHERE id = :worker AND beat = :beat;

-- name: remove_worker
DELETE FROM worker WHERE id = :worker;

-- name: ready_again
-- Bounded: after a long stop of all workers there may be many.
UPDATE run SET due = 0 WHERE seq IN
    (SELECT seq FROM run WHERE status = 'queued' AND due > 0 AND due <= :now ORDER BY due LIMIT 100);

-- name: next_lane
SELECT tenant, priority FROM lane WHERE ready > 0 AND open = 1 ORDER BY priority, turn LIMIT 1;

-- name: next_run
SELECT seq, id, attempt, failures FROM run
WHERE status = 'queued' AND due = 0 AND tenant = :tenant AND priority = :priority
ORDER BY seq LIMIT 1;

-- name: lease
UPDATE run SET status = :status, attempt = :attempt, worker = :worker, changed = :now
WHERE seq = :seq;

-- name: add_attempt
INSERT INTO attempt (run, number, worker, status, started)
VALUES (:run, :attempt, :worker, :status, :now);

-- name: take_turn
UPDATE lane SET turn = :turn WHERE tenant = :tenant AND priority = :priority;

-- name: held
-- The fence: what an attempt may write, it may write while this finds its row.
SELECT status, cancelling, failures FROM run
WHERE id = :run AND attempt = :attempt AND worker = :worker;

-- name: start
UPDATE run SET status = :status, changed = :now WHERE id = :run;

-- name: end_run
UPDATE run SET status = :status, due = :due, failures = :failures, dead = :dead, reason = :reason,
       cancelling = 0, worker = NULL, changed = :now
WHERE id = :run;

-- name: end_attempt
UPDATE attempt SET status = :status, ended = :now WHERE run = :run AND number = :attempt;

-- name: cancel_later
UPDATE run SET cancelling = 1 WHERE id = :run;

-- name: replay
UPDATE run SET status = :status, due = 0, failures = 0, dead = 0, changed = :now WHERE id = :run;

-- name: ended
SELECT seq, id FROM run
WHERE status IN ('succeeded', 'failed', 'cancelled', 'expired') AND dead = :dead
AND changed < :before ORDER BY changed LIMIT :few;

-- name: forget_attempts
DELETE FROM attempt WHERE run = :run;

-- name: forget_run
DELETE FROM run WHERE seq = :seq;

-- name: held_by
SELECT id, attempt FROM run WHERE worker = :worker;

-- name: to_cancel
SELECT id FROM run WHERE worker = :worker AND cancelling = 1;

-- name: version
PRAGMA data_version;

-- name: any_due
SELECT 1 FROM run WHERE status = 'queued' AND due > 0 AND due <=
    CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER) LIMIT 1;

-- name: count_lanes
SELECT coalesce(sum(ready), 0) FROM lane;

-- name: count_held
SELECT coalesce(sum(held), 0) FROM tenant;

-- name: count_delayed
SELECT count(*) FROM run WHERE status = 'queued' AND due > 0;

-- name: count_dead
SELECT count(*) FROM run WHERE dead = 1;

-- name: count_workers
SELECT count(*) FROM worker;

-- name: oldest
-- The first of each lane, not each run.
SELECT min((SELECT r.submitted FROM run r WHERE r.status = 'queued' AND r.due = 0
            AND r.tenant = l.tenant AND r.priority = l.priority ORDER BY r.seq LIMIT 1))
FROM lane l WHERE l.ready > 0;

-- name: dead_letters
SELECT id, tenant, attempt, reason, changed FROM run
WHERE dead = 1 AND id > :after ORDER BY id LIMIT :limit;
