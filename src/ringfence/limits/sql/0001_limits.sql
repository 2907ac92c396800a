-- A lane is one value: its acts need all of it, and one row is one page.
CREATE TABLE lane (name TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE budget (key TEXT PRIMARY KEY, usd REAL NOT NULL, tokens REAL NOT NULL)
STRICT, WITHOUT ROWID;

CREATE TABLE hold (
  id TEXT NOT NULL,
  key TEXT NOT NULL,
  usd REAL NOT NULL,
  tokens REAL NOT NULL,
  likely_usd REAL NOT NULL,
  likely_tokens REAL NOT NULL,
  until REAL NOT NULL,
  PRIMARY KEY (id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX hold_key ON hold (key);
CREATE INDEX hold_until ON hold (until);
