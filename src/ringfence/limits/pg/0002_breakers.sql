-- Breakers in PostgreSQL: what ringfence.limits.breaker does, one function an act. They need not
-- outlive a crash of the server: what fails opens them again.
CREATE UNLOGGED TABLE IF NOT EXISTS limits_breaker (
  key text PRIMARY KEY,
  state text NOT NULL DEFAULT 'closed',
  since double precision NOT NULL DEFAULT 0,
  ends double precision NOT NULL DEFAULT 0,
  trips int NOT NULL DEFAULT 0,
  slot bigint NOT NULL DEFAULT 0,
  fine int[] NOT NULL DEFAULT '{0,0}',
  failed int[] NOT NULL DEFAULT '{0,0}',
  won int NOT NULL DEFAULT 0,
  in_a_row int NOT NULL DEFAULT 0,
  probes jsonb NOT NULL DEFAULT '{}'
);
--;
CREATE UNLOGGED TABLE IF NOT EXISTS limits_purse (
  key text PRIMARY KEY,
  tokens double precision NOT NULL,
  at double precision NOT NULL
);
--;
CREATE OR REPLACE FUNCTION limits_clock(given double precision)
RETURNS double precision LANGUAGE sql AS $$
  SELECT coalesce(given, extract(epoch FROM clock_timestamp())::double precision)
$$;
--;
-- k: window, failures, share, opens, longest, probes, lease, wins, row.
CREATE OR REPLACE FUNCTION limits_admit(name text, k double precision[], probe text,
  settled double precision, given double precision)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  b limits_breaker;
  now_at double precision := limits_clock(given);
  rest double precision;
  back double precision;
  before text := '';
BEGIN
  SELECT * INTO b FROM limits_breaker WHERE key = name;
  IF NOT FOUND OR b.state = 'closed' THEN
    rest := settled - (now_at - coalesce(b.since, 0));
    IF rest > 0 AND rest <= settled THEN
      RETURN jsonb_build_array('no', 'closed', rest, '');
    END IF;
    RETURN '["go", "closed", 0, ""]';
  END IF;
  SELECT * INTO b FROM limits_breaker WHERE key = name FOR UPDATE;
  now_at := limits_clock(given);
  IF b.state = 'closed' THEN
    RETURN limits_admit(name, k, probe, settled, given);
  END IF;
  rest := b.ends - now_at;
  IF b.state = 'open' THEN
    IF rest > 0 AND rest <= k[5] THEN
      RETURN jsonb_build_array('no', 'open', rest, '');
    END IF;
    before := 'open';
    b.state := 'half-open';
    b.since := now_at;
    b.won := 0;
    b.probes := '{}';
  END IF;
  SELECT coalesce(jsonb_object_agg(id, ends), '{}') INTO b.probes
    FROM jsonb_each(b.probes) AS each(id, ends)
    WHERE now_at < ends::double precision AND ends::double precision <= now_at + k[7];
  back := (b.probes ->> ('!' || split_part(probe, '/', 1)))::double precision;
  IF back IS NOT NULL THEN
    rest := least(1.0, back - now_at);
  ELSIF NOT b.probes ? probe AND
    (SELECT count(*) FROM jsonb_object_keys(b.probes) AS id WHERE left(id, 1) <> '!') >= k[6] THEN
    SELECT least(1.0, min(ends::double precision) - now_at) INTO rest
      FROM jsonb_each(b.probes) AS each(id, ends) WHERE left(id, 1) <> '!';
  ELSE
    rest := NULL;
    b.probes := jsonb_set(b.probes, ARRAY[probe], to_jsonb(now_at + k[7]));
  END IF;
  UPDATE limits_breaker SET state = b.state, since = b.since, won = b.won, probes = b.probes
    WHERE key = name;
  IF rest IS NOT NULL THEN
    RETURN jsonb_build_array('no', 'half-open', rest, before);
  END IF;
  RETURN jsonb_build_array('probe', 'half-open', 0, before);
END $$;
--;
CREATE OR REPLACE FUNCTION limits_note(name text, k double precision[], probe text, ok boolean,
  given double precision)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  b limits_breaker;
  now_at double precision;
  mine boolean;
  at_slot bigint;
  seconds double precision := 0;
  opened boolean := false;
  before text := '';
BEGIN
  LOOP
    SELECT * INTO b FROM limits_breaker WHERE key = name FOR UPDATE;
    EXIT WHEN FOUND;
    now_at := limits_clock(given);
    -- rows that others hold are not idle, and to wait for them could wait for ever
    DELETE FROM limits_breaker WHERE key IN (SELECT key FROM limits_breaker
      WHERE state = 'closed' AND greatest(since, (slot + 1) * k[1] / 2) < now_at - 3600
      FOR UPDATE SKIP LOCKED);
    INSERT INTO limits_breaker (key) VALUES (name) ON CONFLICT DO NOTHING;
  END LOOP;
  now_at := limits_clock(given);
  mine := b.probes ? probe;
  b.probes := b.probes - probe;
  IF ok IS NULL AND mine AND b.state = 'half-open' THEN
    b.probes := jsonb_set(b.probes, ARRAY['!' || split_part(probe, '/', 1)],
      to_jsonb(now_at + least(5.0, k[7])));
  ELSIF ok IS NOT NULL AND b.state = 'closed' THEN
    at_slot := floor(now_at / (k[1] / 2));
    IF at_slot = b.slot + 1 THEN
      b.fine := ARRAY[0, b.fine[1]];
      b.failed := ARRAY[0, b.failed[1]];
    ELSIF at_slot <> b.slot THEN
      b.fine := '{0,0}';
      b.failed := '{0,0}';
    END IF;
    b.slot := at_slot;
    IF ok THEN
      b.fine[1] := b.fine[1] + 1;
      b.in_a_row := 0;
    ELSE
      b.failed[1] := b.failed[1] + 1;
      b.in_a_row := b.in_a_row + 1;
      opened := b.in_a_row >= k[9] OR b.failed[1] + b.failed[2] >= k[2] AND b.failed[1] + b.failed[2]
        >= k[3] * (b.failed[1] + b.failed[2] + b.fine[1] + b.fine[2]);
    END IF;
  ELSIF ok IS NOT NULL AND b.state = 'half-open' AND mine THEN
    IF ok THEN
      b.won := b.won + 1;
      IF b.won >= k[8] THEN
        before := b.state;
        b.state := 'closed';
        b.since := now_at;
        b.ends := 0;
        b.trips := 0;
        b.won := 0;
        b.probes := '{}';
        b.fine := '{0,0}';
        b.failed := '{0,0}';
        b.in_a_row := 0;
      END IF;
    ELSE
      opened := true;
    END IF;
  END IF;
  IF opened THEN
    before := b.state;
    seconds := least(k[5], k[4] * 2.0 ^ least(b.trips, 30));
    b.state := 'open';
    b.since := now_at;
    b.ends := now_at + seconds;
    b.trips := b.trips + 1;
    b.won := 0;
    b.probes := '{}';
  END IF;
  UPDATE limits_breaker SET state = b.state, since = b.since, ends = b.ends, trips = b.trips,
    slot = b.slot, fine = b.fine, failed = b.failed, won = b.won, in_a_row = b.in_a_row, probes = b.probes
    WHERE key = name;
  RETURN jsonb_build_array(b.state, before, seconds);
END $$;
--;
CREATE OR REPLACE FUNCTION limits_spend(name text, k double precision[], earned double precision,
  given double precision)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  p limits_purse;
  now_at double precision;
  may boolean;
BEGIN
  INSERT INTO limits_purse VALUES (name, k[2], limits_clock(given)) ON CONFLICT DO NOTHING;
  SELECT * INTO p FROM limits_purse WHERE key = name FOR UPDATE;
  now_at := limits_clock(given);
  p.tokens := least(k[2], p.tokens + greatest(0, now_at - p.at) * k[3] + earned * k[1]);
  may := p.tokens >= 1;
  UPDATE limits_purse SET tokens = p.tokens - may::int, at = now_at WHERE key = name;
  RETURN may;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_breakers() RETURNS jsonb LANGUAGE sql AS $$
  SELECT jsonb_build_object('now', limits_clock(NULL), 'breakers', coalesce(jsonb_object_agg(key,
    jsonb_build_object('state', state, 'since', since, 'until', ends, 'trips', trips, 'slot', slot,
      'fine', fine, 'failed', failed, 'row', in_a_row, 'won', won, 'probes', probes)), '{}'))
  FROM limits_breaker
$$;
