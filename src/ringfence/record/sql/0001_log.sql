-- The log: one row a record, in order, never changed.
CREATE TABLE record (
    idx     INTEGER PRIMARY KEY,
    body    BLOB NOT NULL,      -- canonical JSON of the record
    leaf    BLOB NOT NULL,      -- RFC 6962 leaf hash: SHA-256(0x00 || body)
    run     TEXT NOT NULL       -- copy of body's run_id, for looking up; the verifier compares it
) STRICT;

-- Signed heads (C2SP checkpoint notes).
CREATE TABLE checkpoint (
    size    INTEGER PRIMARY KEY,
    note    TEXT NOT NULL
) STRICT;

-- What appending needs of the tree, so that opening a long log does not read it all, and whose
-- turn it is to sign. It is a cache: the verifier computes everything anew.
CREATE TABLE frontier (
    only    INTEGER PRIMARY KEY CHECK (only = 0),
    size    INTEGER NOT NULL,
    hashes  BLOB NOT NULL,
    time_us INTEGER NOT NULL,
    signer  BLOB NOT NULL
) STRICT;

INSERT INTO frontier VALUES (0, 0, x'', 0, x'');

CREATE INDEX record_run ON record (run, idx) WHERE run <> '';

-- These hold our own mistakes back. Someone who can write the file can drop them; what shows
-- that is the tree.
CREATE TRIGGER record_in_order BEFORE INSERT ON record
WHEN NEW.idx IS NOT (SELECT coalesce(max(idx), -1) + 1 FROM record)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER record_no_update BEFORE UPDATE ON record
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER record_no_delete BEFORE DELETE ON record
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER checkpoint_once BEFORE INSERT ON checkpoint
WHEN EXISTS (SELECT 1 FROM checkpoint WHERE size = NEW.size)
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER checkpoint_no_update BEFORE UPDATE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

CREATE TRIGGER checkpoint_no_delete BEFORE DELETE ON checkpoint
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
