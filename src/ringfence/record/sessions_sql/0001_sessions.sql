-- Transcripts: one row an entry, in the order they came. The SDK's project key is kept for its
-- own contract; runs use one constant for it, so that session ids are global to this store.
CREATE TABLE session (
    project     TEXT NOT NULL,
    id          TEXT NOT NULL,
    created     INTEGER NOT NULL,           -- milliseconds since the epoch
    changed     INTEGER NOT NULL,
    bytes       INTEGER NOT NULL DEFAULT 0,
    parent      TEXT NOT NULL DEFAULT '',   -- the session it was forked from
    summary     TEXT,                       -- the SDK's own fold, opaque
    folded      INTEGER NOT NULL DEFAULT 0, -- seq of the last entry in `summary`
    PRIMARY KEY (project, id)
) STRICT;

CREATE TABLE entry (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    project     TEXT NOT NULL,
    session     TEXT NOT NULL,
    subpath     TEXT NOT NULL,
    uuid        TEXT,
    body        TEXT NOT NULL,
    FOREIGN KEY (project, session) REFERENCES session (project, id) ON DELETE CASCADE
) STRICT;

CREATE INDEX entry_key ON entry (project, session, subpath, seq);

-- An entry's uuid is its idempotency key: the mirror may send it again.
CREATE UNIQUE INDEX entry_uuid ON entry (project, session, subpath, uuid) WHERE uuid IS NOT NULL;

-- The right of one run to a session. A lease that has expired may be taken over; the token then
-- grows, and whoever held it before can write no more.
CREATE TABLE lease (
    session     TEXT PRIMARY KEY,
    run         TEXT NOT NULL,
    token       INTEGER NOT NULL,
    expires     INTEGER NOT NULL            -- milliseconds since the epoch; 0 when released
) STRICT;
