-- Holds that were paid by what was likely: what they came to may still be said.
CREATE TABLE lapsed (
  id TEXT NOT NULL,
  key TEXT NOT NULL,
  usd REAL NOT NULL,
  tokens REAL NOT NULL,
  until REAL NOT NULL,
  PRIMARY KEY (id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX lapsed_until ON lapsed (until);
