-- Runs and who may try them. Times are milliseconds since the epoch, of the clock that SQLite reads
-- on this host, and decide only when a run that waits is due. Who is silent is decided without any
-- clock in this file: see worker.beat.

CREATE TABLE worker (
    id         TEXT PRIMARY KEY,
    beat       INTEGER NOT NULL DEFAULT 0  -- a counter; who sees it stand still measures how long
) STRICT, WITHOUT ROWID;

CREATE TABLE tenant (
    name       TEXT PRIMARY KEY,
    cap        INTEGER,                     -- most runs held at once; NULL: no limit
    held       INTEGER NOT NULL DEFAULT 0   -- runs that workers hold
) STRICT, WITHOUT ROWID;

-- A tenant's runs of one priority. Lanes take turns: the one served longest ago is next.
CREATE TABLE lane (
    tenant     TEXT NOT NULL REFERENCES tenant (name),
    priority   INTEGER NOT NULL,
    ready      INTEGER NOT NULL DEFAULT 0,  -- runs that could be leased now
    open       INTEGER NOT NULL DEFAULT 1,  -- 0 while the tenant holds all it may
    turn       INTEGER NOT NULL DEFAULT 0,  -- attempt.seq of the last lease
    PRIMARY KEY (tenant, priority)
) STRICT, WITHOUT ROWID;

CREATE INDEX lane_next ON lane (priority, turn) WHERE ready > 0 AND open = 1;

CREATE TABLE run (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    tenant     TEXT NOT NULL,
    priority   INTEGER NOT NULL,
    status     TEXT NOT NULL,
    due        INTEGER NOT NULL DEFAULT 0,  -- 0: not waiting for a time
    attempt    INTEGER NOT NULL DEFAULT 0,  -- fencing token; only ever grows
    failures   INTEGER NOT NULL DEFAULT 0,
    worker     TEXT,                        -- who holds it; NULL: nobody
    cancelling INTEGER NOT NULL DEFAULT 0,
    dead       INTEGER NOT NULL DEFAULT 0,
    reason     TEXT NOT NULL DEFAULT '',
    submitted  INTEGER NOT NULL,
    changed    INTEGER NOT NULL,
    CHECK ((worker IS NOT NULL) = (status IN ('leased', 'running')))
) STRICT;

CREATE INDEX run_ready ON run (tenant, priority, seq) WHERE status = 'queued' AND due = 0;
CREATE INDEX run_due ON run (due) WHERE status = 'queued' AND due > 0;
CREATE INDEX run_held ON run (worker) WHERE worker IS NOT NULL;
CREATE INDEX run_dead ON run (id) WHERE dead = 1;

CREATE TABLE attempt (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    run        TEXT NOT NULL,
    number     INTEGER NOT NULL,
    worker     TEXT NOT NULL,
    status     TEXT NOT NULL,
    started    INTEGER NOT NULL,
    ended      INTEGER,
    UNIQUE (run, number)
) STRICT;

-- The tables of ringfence.states, as pairs: a test holds both to the same moves.
CREATE TABLE move (
    kind       TEXT NOT NULL,
    before     TEXT NOT NULL,
    after      TEXT NOT NULL,
    PRIMARY KEY (kind, before, after)
) STRICT, WITHOUT ROWID;

INSERT INTO move VALUES
    ('run', 'queued', 'leased'),
    ('run', 'queued', 'cancelled'),
    ('run', 'leased', 'running'),
    ('run', 'leased', 'failed'),
    ('run', 'leased', 'cancelled'),
    ('run', 'leased', 'queued'),
    ('run', 'running', 'succeeded'),
    ('run', 'running', 'failed'),
    ('run', 'running', 'cancelled'),
    ('run', 'running', 'expired'),
    ('run', 'running', 'queued'),
    ('run', 'failed', 'queued'),
    ('attempt', 'started', 'settled'),
    ('attempt', 'started', 'lost');

CREATE TRIGGER run_moves BEFORE UPDATE OF status ON run
WHEN NEW.status <> OLD.status AND NOT EXISTS
    (SELECT 1 FROM move WHERE kind = 'run' AND before = OLD.status AND after = NEW.status)
BEGIN
    SELECT raise(ABORT, 'a run cannot move so');
END;

CREATE TRIGGER run_replayed BEFORE UPDATE OF status ON run
WHEN OLD.status = 'failed' AND NEW.status = 'queued' AND OLD.dead = 0
BEGIN
    SELECT raise(ABORT, 'only a dead letter is replayed');
END;

CREATE TRIGGER attempt_moves BEFORE UPDATE OF status ON attempt
WHEN NOT EXISTS
    (SELECT 1 FROM move WHERE kind = 'attempt' AND before = OLD.status AND after = NEW.status)
BEGIN
    SELECT raise(ABORT, 'an attempt cannot move so');
END;

CREATE TRIGGER run_fenced BEFORE UPDATE OF attempt ON run
WHEN NEW.attempt < OLD.attempt
BEGIN
    SELECT raise(ABORT, 'a fencing token only grows');
END;

-- Counts follow the rows they count, whatever statement moves them.
CREATE TRIGGER run_made AFTER INSERT ON run
WHEN NEW.status = 'queued' AND NEW.due = 0
BEGIN
    UPDATE lane SET ready = ready + 1 WHERE tenant = NEW.tenant AND priority = NEW.priority;
END;

CREATE TRIGGER run_readied AFTER UPDATE OF status, due ON run
WHEN (NEW.status = 'queued' AND NEW.due = 0) <> (OLD.status = 'queued' AND OLD.due = 0)
BEGIN
    UPDATE lane
    SET ready = ready + CASE WHEN NEW.status = 'queued' AND NEW.due = 0 THEN 1 ELSE -1 END
    WHERE tenant = NEW.tenant AND priority = NEW.priority;
END;

CREATE TRIGGER run_taken AFTER UPDATE OF worker ON run
WHEN (NEW.worker IS NULL) <> (OLD.worker IS NULL)
BEGIN
    UPDATE tenant SET held = held + CASE WHEN NEW.worker IS NULL THEN -1 ELSE 1 END
    WHERE name = NEW.tenant;
END;

CREATE TRIGGER tenant_filled AFTER UPDATE OF held, cap ON tenant
WHEN (NEW.cap IS NULL OR NEW.held < NEW.cap) <> (OLD.cap IS NULL OR OLD.held < OLD.cap)
BEGIN
    UPDATE lane SET open = (NEW.cap IS NULL OR NEW.held < NEW.cap) WHERE tenant = NEW.name;
END;
