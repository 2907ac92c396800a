-- The log: one row a record, in order, never changed.
CREATE TABLE record (
    idx     INTEGER PRIMARY KEY,
    body    BLOB NOT NULL,      -- canonical JSON of the record
    leaf    BLOB NOT NULL,      -- RFC 6962 leaf hash: SHA-256(0x00 || body)
    run     TEXT NOT NULL       -- copy of body's run_id, for looking up; the verifier ignores it
) STRICT;

CREATE TRIGGER record_no_update BEFORE UPDATE ON record
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER record_no_delete BEFORE DELETE ON record
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

-- Signed heads (C2SP checkpoint notes).
CREATE TABLE checkpoint (
    size    INTEGER PRIMARY KEY,
    note    TEXT NOT NULL
) STRICT;

CREATE TRIGGER checkpoint_no_update BEFORE UPDATE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER checkpoint_no_delete BEFORE DELETE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

-- What appending needs of the tree, so that opening a long log does not read it all. It is a
-- cache: the verifier computes everything anew.
CREATE TABLE frontier (
    only    INTEGER PRIMARY KEY CHECK (only = 0),
    size    INTEGER NOT NULL,
    hashes  BLOB NOT NULL,
    time_us INTEGER NOT NULL
) STRICT;

INSERT INTO frontier VALUES (0, 0, x'', 0);

CREATE INDEX record_run ON record (run, idx) WHERE run <> '';
