-- An act writes what it changed: with hundreds of requests in the queue, to read and write all of a
-- lane for each of them would hold the file for longer than the limit leaves between two. What was
-- counted so far is let go: a limit that was forgotten is full, and the provider corrects it.
DROP TABLE lane;
-- `state` is all of it but for its tenants and tickets.
CREATE TABLE lane (name TEXT PRIMARY KEY, state TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE tenant (
  lane TEXT NOT NULL,
  name TEXT NOT NULL,
  at REAL NOT NULL,
  state TEXT NOT NULL,
  PRIMARY KEY (lane, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE ticket (
  lane TEXT NOT NULL,
  id TEXT NOT NULL,
  tenant TEXT NOT NULL,
  batch INTEGER NOT NULL,
  start REAL NOT NULL,
  seq INTEGER NOT NULL,
  requests REAL NOT NULL,
  input_tokens REAL NOT NULL,
  output_tokens REAL NOT NULL,
  share REAL NOT NULL,
  weight REAL NOT NULL,
  alive REAL NOT NULL,
  since REAL NOT NULL,
  parked INTEGER NOT NULL,
  granted INTEGER NOT NULL,
  PRIMARY KEY (lane, id)
) STRICT, WITHOUT ROWID;
