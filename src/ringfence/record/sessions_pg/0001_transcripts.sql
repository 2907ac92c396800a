-- Transcripts: one row an entry, in the order of its position within its session. The tables stand
-- by themselves: they may lie in another database than the platform's, and have versions of their
-- own.
CREATE TABLE transcript_session (
    tenant      TEXT NOT NULL,
    project     TEXT NOT NULL,
    session     TEXT NOT NULL,
    created     BIGINT NOT NULL,            -- milliseconds since the epoch, the server's clock
    changed     BIGINT NOT NULL,
    bytes       BIGINT NOT NULL DEFAULT 0,
    entries     BIGINT NOT NULL DEFAULT 0,
    next        BIGINT NOT NULL DEFAULT 0,  -- the next position; whoever appends holds this row
    parent      TEXT NOT NULL DEFAULT '',
    summary     TEXT,                       -- the SDK's own fold, opaque
    folded      BIGINT NOT NULL DEFAULT 0,  -- how many entries of the main transcript are in it
    PRIMARY KEY (tenant, project, session)
);

CREATE INDEX transcript_session_changed ON transcript_session (tenant, project, changed DESC);

-- `body` is ASCII text and no jsonb: that has no NUL and reorders keys.
CREATE TABLE transcript_entry (
    tenant      TEXT NOT NULL,
    project     TEXT NOT NULL,
    session     TEXT NOT NULL,
    subpath     TEXT NOT NULL,
    position    BIGINT NOT NULL,
    uuid        TEXT,
    body        TEXT NOT NULL,
    PRIMARY KEY (tenant, project, session, subpath, position),
    FOREIGN KEY (tenant, project, session) REFERENCES transcript_session ON DELETE CASCADE
);

-- An entry's uuid is its idempotency key: the mirror may send it again.
CREATE UNIQUE INDEX transcript_entry_uuid
    ON transcript_entry (tenant, project, session, subpath, uuid) WHERE uuid IS NOT NULL;

-- The right of one run to a session. No foreign key: it may come before the session, and its token
-- outlives it, so that a writer of before a deletion can write no more.
CREATE TABLE transcript_lease (
    tenant      TEXT NOT NULL,
    session     TEXT NOT NULL,
    run         TEXT NOT NULL,
    token       BIGINT NOT NULL,
    expires     BIGINT NOT NULL,
    PRIMARY KEY (tenant, session)
);
