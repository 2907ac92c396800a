-- Limits in PostgreSQL: what ringfence.limits.lane and .budget do, one function an act. A lane's
-- row is locked first, so that acts on a lane come one after the other, and no two can wait for
-- each other. Statements are parted by dashes with a semicolon; all may be said again, which brings
-- an older schema to this one.
-- Rates need not outlive a crash of the server: a limit that was forgotten is full, and the
-- provider corrects it. Budgets do.
CREATE UNLOGGED TABLE IF NOT EXISTS limits_lane (
  name text PRIMARY KEY,
  at double precision NOT NULL,
  levels double precision[] NOT NULL,
  learned double precision[] NOT NULL,
  blocked double precision NOT NULL,
  seq bigint NOT NULL,
  served double precision NOT NULL,
  class_finish double precision[] NOT NULL,
  virtual double precision[] NOT NULL
);
--;
CREATE UNLOGGED TABLE IF NOT EXISTS limits_tenant (
  lane text NOT NULL,
  tenant text NOT NULL,
  at double precision NOT NULL,
  caps double precision[] NOT NULL,
  levels double precision[] NOT NULL,
  finish double precision[] NOT NULL,
  PRIMARY KEY (lane, tenant)
);
--;
CREATE UNLOGGED TABLE IF NOT EXISTS limits_ticket (
  lane text NOT NULL,
  id text NOT NULL,
  tenant text NOT NULL,
  batch int NOT NULL,
  start double precision NOT NULL,
  seq bigint NOT NULL,
  amount double precision[] NOT NULL,
  share double precision NOT NULL,
  weight double precision NOT NULL,
  alive double precision NOT NULL,
  since double precision NOT NULL,
  parked boolean NOT NULL,
  PRIMARY KEY (lane, id)
);
--;
-- Served, and not yet asked after by its process.
ALTER TABLE limits_ticket ADD COLUMN IF NOT EXISTS granted boolean NOT NULL DEFAULT false;
--;
CREATE TABLE IF NOT EXISTS limits_budget (
  key text PRIMARY KEY,
  usd double precision NOT NULL,
  tokens double precision NOT NULL
);
--;
-- Holds that were paid by what was likely: what they came to may still be said.
CREATE TABLE IF NOT EXISTS limits_lapsed (
  id text NOT NULL,
  key text NOT NULL,
  usd double precision NOT NULL,
  tokens double precision NOT NULL,
  until double precision NOT NULL,
  PRIMARY KEY (id, key)
);
--;
CREATE TABLE IF NOT EXISTS limits_hold (
  id text NOT NULL,
  key text NOT NULL,
  usd double precision NOT NULL,
  tokens double precision NOT NULL,
  likely_usd double precision NOT NULL,
  likely_tokens double precision NOT NULL,
  until double precision NOT NULL,
  PRIMARY KEY (id, key)
);
--;
CREATE INDEX IF NOT EXISTS limits_ticket_order ON limits_ticket (lane, batch, start, seq)
WHERE NOT parked AND NOT granted;
--;
CREATE INDEX IF NOT EXISTS limits_hold_key ON limits_hold (key);
--;
CREATE INDEX IF NOT EXISTS limits_hold_until ON limits_hold (until);
--;
-- What a bucket holds; metric 1 is requests. `k` is burst, fill, window, batch_share, patience.
CREATE OR REPLACE FUNCTION limits_capacity(cap double precision, metric int, k double precision[])
RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN metric = 1 THEN greatest(cap * k[1], 1.0) ELSE cap * k[1] END
$$;
--;
CREATE OR REPLACE FUNCTION limits_levels_at(
  levels double precision[], caps double precision[], seconds double precision,
  k double precision[]
) RETURNS double precision[] LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg(
    CASE WHEN caps[i] IS NULL THEN NULL
         WHEN levels[i] IS NULL THEN limits_capacity(caps[i], i, k)
         ELSE least(limits_capacity(caps[i], i, k),
                    levels[i] + caps[i] * k[2] / k[3] * greatest(0.0, seconds)) END ORDER BY i)
  FROM generate_series(1, 3) AS i
$$;
--;
CREATE OR REPLACE FUNCTION limits_moved(
  levels double precision[], by double precision[], sign double precision,
  caps double precision[], k double precision[]
) RETURNS double precision[] LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg(
    CASE WHEN levels[i] IS NULL OR caps[i] IS NULL THEN NULL
         ELSE least(limits_capacity(caps[i], i, k), levels[i] + sign * by[i]) END ORDER BY i)
  FROM generate_series(1, 3) AS i
$$;
--;
CREATE OR REPLACE FUNCTION limits_fits(
  levels double precision[], amount double precision[], caps double precision[],
  k double precision[]
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT bool_and(levels[i] IS NULL OR caps[i] IS NULL
                  OR levels[i] + 1e-9 >= least(amount[i], limits_capacity(caps[i], i, k)))
  FROM generate_series(1, 3) AS i
$$;
--;
CREATE OR REPLACE FUNCTION limits_least(one double precision[], other double precision[])
RETURNS double precision[] LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg(least(one[i], other[i]) ORDER BY i) FROM generate_series(1, 3) AS i
$$;
--;
-- Lock a lane, make it if need be, and bring its buckets to a time; to none, where it is null.
CREATE OR REPLACE FUNCTION limits_lane_at(
  lane_name text, caps double precision[], k double precision[], now_at double precision
) RETURNS limits_lane LANGUAGE plpgsql AS $$
DECLARE
  here limits_lane;
BEGIN
  SELECT * INTO here FROM limits_lane WHERE name = lane_name FOR UPDATE;
  IF NOT FOUND THEN
    INSERT INTO limits_lane VALUES (
      lane_name, 0, array_fill(NULL::double precision, ARRAY[3]),
      array_fill(NULL::double precision, ARRAY[3]), 0, 0, 0, '{0,0}', '{0,0}')
    ON CONFLICT DO NOTHING;
    SELECT * INTO here FROM limits_lane WHERE name = lane_name FOR UPDATE;
  END IF;
  IF here.at - now_at > k[3] THEN  -- see lane._set_back
    UPDATE limits_tenant o SET at = least(o.at, now_at) WHERE o.lane = lane_name;
    UPDATE limits_ticket t SET alive = t.alive - (here.at - now_at),
      since = t.since - (here.at - now_at) WHERE t.lane = lane_name;
    here.blocked := here.blocked - (here.at - now_at);
    here.at := now_at;
  END IF;
  here.levels := limits_levels_at(
    here.levels, limits_least(caps, here.learned), now_at - here.at, k);
  here.at := greatest(here.at, now_at);
  RETURN here;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_save(here limits_lane) RETURNS void LANGUAGE sql AS $$
  UPDATE limits_lane SET at = here.at, levels = here.levels, learned = here.learned,
    blocked = here.blocked, seq = here.seq, served = here.served,
    class_finish = here.class_finish, virtual = here.virtual
  WHERE name = here.name
$$;
--;
-- When a class begins to serve a request: see lane._class_turn.
CREATE OR REPLACE FUNCTION limits_class_start(
  here limits_lane, class int, share double precision, k double precision[]
) RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
  SELECT greatest(here.class_finish[class + 1],
                  here.served - share / CASE class WHEN 1 THEN k[4] ELSE 1 - k[4] END)
$$;
--;
-- Whose turn it is: see lane._head. Of each class the first that its tenant's own limits let pass:
-- in the order of an index, so that a long queue is not looked through.
CREATE OR REPLACE FUNCTION limits_head(here limits_lane, k double precision[], now_at double precision)
RETURNS limits_ticket LANGUAGE plpgsql AS $$
DECLARE
  head limits_ticket;
BEGIN
  SELECT f.* INTO head
  FROM (VALUES (0), (1)) AS c (class) CROSS JOIN LATERAL (
    SELECT t.* FROM limits_ticket t JOIN limits_tenant o ON o.lane = t.lane AND o.tenant = t.tenant
    WHERE t.lane = here.name AND t.batch = c.class AND NOT t.parked
      AND NOT t.granted AND limits_fits(
      limits_levels_at(o.levels, o.caps, now_at - o.at, k), t.amount, o.caps, k)
    ORDER BY t.start, t.seq LIMIT 1
  ) AS f
  ORDER BY limits_class_start(here, f.batch, f.share, k)
    + f.share / CASE f.batch WHEN 1 THEN k[4] ELSE 1 - k[4] END, f.batch LIMIT 1;
  RETURN head;
END $$;
--;
-- What a tenant of a lane has taken comes back to both, or the reverse: see lane._move.
CREATE OR REPLACE FUNCTION limits_move(
  here limits_lane, whose text, by double precision[], sign double precision,
  caps double precision[], k double precision[], now_at double precision
) RETURNS limits_lane LANGUAGE plpgsql AS $$
BEGIN
  here.levels := limits_moved(here.levels, by, sign, caps, k);
  UPDATE limits_tenant o SET at = greatest(o.at, now_at), levels = limits_moved(
      limits_levels_at(o.levels, o.caps, now_at - o.at, k), by, sign, o.caps, k)
    WHERE o.lane = here.name AND o.tenant = whose;
  RETURN here;
END $$;
--;
-- What was served of these, and nobody will come for.
CREATE OR REPLACE FUNCTION limits_back(
  here limits_lane, ids text[], caps double precision[], k double precision[],
  now_at double precision
) RETURNS limits_lane LANGUAGE plpgsql AS $$
DECLARE
  gone limits_ticket;
BEGIN
  FOR gone IN SELECT * FROM limits_ticket t
      WHERE t.lane = here.name AND t.id = ANY(ids) AND t.granted LOOP
    here := limits_move(here, gone.tenant, gone.amount, 1, caps, k, now_at);
  END LOOP;
  RETURN here;
END $$;
--;
-- See lane._give_up. The lane is locked.
CREATE OR REPLACE FUNCTION limits_give_up(
  lane_name text, ids text[], virtual double precision[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  gone limits_ticket;
  part double precision;
  now_served double precision;
BEGIN
  FOR gone IN SELECT * FROM limits_ticket t WHERE t.lane = lane_name AND t.id = ANY(ids)
      ORDER BY t.seq DESC LOOP
    IF gone.granted THEN
      DELETE FROM limits_ticket t WHERE t.lane = lane_name AND t.id = gone.id;
      CONTINUE;
    END IF;
    part := gone.share / gone.weight;
    now_served := virtual[gone.batch + 1];
    UPDATE limits_tenant o SET finish[gone.batch + 1] = greatest(
        o.finish[gone.batch + 1] - part, least(o.finish[gone.batch + 1], now_served))
      WHERE o.lane = lane_name AND o.tenant = gone.tenant;
    UPDATE limits_ticket t SET start = greatest(t.start - part, least(t.start, now_served))
      WHERE t.lane = lane_name AND t.tenant = gone.tenant AND t.batch = gone.batch
        AND t.seq > gone.seq;
    DELETE FROM limits_ticket t WHERE t.lane = lane_name AND t.id = gone.id;
  END LOOP;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_register(
  here limits_lane, want jsonb, k double precision[], now_at double precision
) RETURNS limits_lane LANGUAGE plpgsql AS $$
DECLARE
  whose limits_tenant;
  wanted double precision[] := ARRAY(
    SELECT each::double precision FROM jsonb_array_elements_text(want->'caps') AS each);
  class int := (want->>'batch')::int;
  first double precision;
  size double precision[] := ARRAY(
    SELECT each::double precision FROM jsonb_array_elements_text(want->'amount') AS each);
  part double precision := (want->>'share')::double precision;
  known limits_ticket;
BEGIN
  SELECT * INTO whose FROM limits_tenant o
    WHERE o.lane = here.name AND o.tenant = want->>'tenant';
  IF NOT FOUND THEN
    INSERT INTO limits_tenant VALUES (
      here.name, want->>'tenant', now_at, wanted,
      array_fill(NULL::double precision, ARRAY[3]), '{0,0}') RETURNING * INTO whose;
  ELSIF whose.caps IS DISTINCT FROM wanted THEN
    UPDATE limits_tenant o SET caps = wanted, at = greatest(o.at, now_at),
      levels = limits_levels_at(o.levels, o.caps, now_at - o.at, k)
    WHERE o.lane = here.name AND o.tenant = whose.tenant;
  END IF;
  SELECT * INTO known FROM limits_ticket t WHERE t.lane = here.name AND t.id = want->>'id';
  IF FOUND THEN
    UPDATE limits_tenant o SET finish[known.batch + 1] =
        o.finish[known.batch + 1] + (part - known.share) / known.weight
      WHERE o.lane = here.name AND o.tenant = whose.tenant AND part <> known.share;
    UPDATE limits_ticket t SET alive = now_at + k[5], parked = false, amount = size, share = part
      WHERE t.lane = here.name AND t.id = known.id;
    RETURN here;
  END IF;
  IF NOT EXISTS (
    SELECT FROM limits_ticket t WHERE t.lane = here.name AND t.batch = class AND NOT t.parked AND NOT t.granted
  ) THEN
    here.class_finish[class + 1] := greatest(here.class_finish[class + 1], here.served);
  END IF;
  first := greatest(here.virtual[class + 1], whose.finish[class + 1]);
  whose.finish[class + 1] :=
    first + part / (want->>'weight')::double precision;
  UPDATE limits_tenant o SET finish = whose.finish
    WHERE o.lane = here.name AND o.tenant = whose.tenant;
  here.seq := here.seq + 1;
  INSERT INTO limits_ticket VALUES (
    here.name, want->>'id', whose.tenant, class, first, here.seq,
    size, part, (want->>'weight')::double precision, now_at + k[5], now_at, false);
  IF here.seq % 64 = 0 THEN
    DELETE FROM limits_tenant o WHERE o.lane = here.name AND o.at <= now_at - 3600
      AND NOT EXISTS (
        SELECT FROM limits_ticket t WHERE t.lane = o.lane AND t.tenant = o.tenant);
  END IF;
  RETURN here;
END $$;
--;
-- Wants that wait already and ask for what they asked for: nothing but how long they live changes,
-- and hundreds of them are one statement. Their ids.
CREATE OR REPLACE FUNCTION limits_again(
  lane_name text, wants jsonb, k double precision[], now_at double precision
) RETURNS text[] LANGUAGE sql AS $$
  WITH again AS (
    UPDATE limits_ticket t SET alive = now_at + k[5]
    FROM jsonb_array_elements(wants) AS want, limits_tenant o
    WHERE t.lane = lane_name AND t.id = want->>'id' AND NOT t.parked
      AND t.tenant = want->>'tenant' AND o.lane = t.lane AND o.tenant = t.tenant
      AND t.share = (want->>'share')::double precision
      AND t.amount = ARRAY(SELECT each::double precision
                           FROM jsonb_array_elements_text(want->'amount') AS each)
      AND o.caps IS NOT DISTINCT FROM ARRAY(
        SELECT each::double precision FROM jsonb_array_elements_text(want->'caps') AS each)
    RETURNING t.id
  )
  SELECT coalesce(array_agg(again.id), '{}') FROM again
$$;
--;
CREATE OR REPLACE FUNCTION limits_grant(
  here limits_lane, head limits_ticket, caps double precision[], k double precision[],
  now_at double precision
) RETURNS limits_lane LANGUAGE plpgsql AS $$
DECLARE
  class int := head.batch + 1;
  first double precision;
BEGIN
  UPDATE limits_ticket t SET granted = true WHERE t.lane = head.lane AND t.id = head.id;
  here := limits_move(here, head.tenant, head.amount, -1, caps, k, now_at);
  first := limits_class_start(here, head.batch, head.share, k);
  here.served := greatest(here.served, first);
  here.class_finish[class] :=
    first + head.share / CASE head.batch WHEN 1 THEN k[4] ELSE 1 - k[4] END;
  here.virtual[class] := greatest(here.virtual[class], head.start);
  RETURN here;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_take(
  lane_name text, caps double precision[], k double precision[], wants jsonb,
  given double precision
) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  now_at double precision := coalesce(given, extract(epoch FROM clock_timestamp()));
  here limits_lane := limits_lane_at(lane_name, caps, k, now_at);
  head limits_ticket;
  want jsonb;
  mine text[] := ARRAY(SELECT each->>'id' FROM jsonb_array_elements(wants) AS each);
  passed text[] := '{}';
  again text[];
  dead text[] := ARRAY(
    SELECT t.id FROM limits_ticket t WHERE t.lane = lane_name AND t.alive <= now_at);
  served limits_ticket;
  waiting jsonb;
BEGIN
  caps := limits_least(caps, here.learned);
  here := limits_back(here, dead, caps, k, now_at);
  PERFORM limits_give_up(lane_name, dead, here.virtual);
  FOR served IN SELECT * FROM limits_ticket t
      WHERE t.lane = lane_name AND t.granted AND t.id = ANY(mine) ORDER BY t.seq LOOP
    SELECT each INTO want FROM jsonb_array_elements(wants) AS each WHERE each->>'id' = served.id;
    here := limits_move(here, served.tenant, ARRAY(
      SELECT served.amount[i] - (want->'amount'->>(i - 1))::double precision
      FROM generate_series(1, 3) AS i ORDER BY i), 1, caps, k, now_at);
    passed := passed || served.id;
  END LOOP;
  DELETE FROM limits_ticket t WHERE t.lane = lane_name AND t.id = ANY(passed);
  again := limits_again(lane_name, wants, k, now_at);
  FOR want IN SELECT * FROM jsonb_array_elements(wants) AS each
      WHERE NOT each->>'id' = ANY(again || passed) LOOP
    here := limits_register(here, want, k, now_at);
  END LOOP;
  WHILE here.blocked <= now_at LOOP
    head := limits_head(here, k, now_at);
    EXIT WHEN head.id IS NULL OR NOT limits_fits(here.levels, head.amount, caps, k);
    here := limits_grant(here, head, caps, k, now_at);
    IF head.id = ANY(mine) THEN
      DELETE FROM limits_ticket t WHERE t.lane = lane_name AND t.id = head.id;
      passed := passed || head.id;
    END IF;
  END LOOP;
  PERFORM limits_save(here);
  WITH ordered AS (
    SELECT t.*, row_number() OVER stood AS place,
      sum(t.amount[1]) OVER stood AS a1, sum(t.amount[2]) OVER stood AS a2,
      sum(t.amount[3]) OVER stood AS a3, sum(t.amount[1]) OVER class AS c1,
      sum(t.amount[2]) OVER class AS c2, sum(t.amount[3]) OVER class AS c3,
      sum(t.amount[1]) OVER own AS o1,
      sum(t.amount[2]) OVER own AS o2, sum(t.amount[3]) OVER own AS o3
    FROM limits_ticket t WHERE t.lane = lane_name AND NOT t.parked AND NOT t.granted
    WINDOW stood AS (ORDER BY t.batch, t.start, t.seq),
      class AS (PARTITION BY t.batch ORDER BY t.start, t.seq),
      own AS (PARTITION BY t.tenant ORDER BY t.batch, t.start, t.seq)
  )
  SELECT coalesce(jsonb_agg(jsonb_build_array(
      w.id, w.place,
      -- batch waits for all, or for its share: see lane.standing
      CASE w.batch WHEN 1 THEN jsonb_build_array(
        least(w.a1, w.c1 / k[4]), least(w.a2, w.c2 / k[4]), least(w.a3, w.c3 / k[4]))
      ELSE jsonb_build_array(w.a1, w.a2, w.a3) END,
      jsonb_build_array(w.o1, w.o2, w.o3),
      limits_levels_at(o.levels, o.caps, now_at - o.at, k)) ORDER BY w.place), '[]')
  INTO waiting FROM ordered w JOIN limits_tenant o ON o.lane = w.lane AND o.tenant = w.tenant
  WHERE w.id = ANY(mine);
  RETURN jsonb_build_object(
    'granted', passed, 'waiting', waiting, 'levels', here.levels, 'caps', caps,
    'blocked', greatest(0.0, here.blocked - now_at));
END $$;
--;
CREATE OR REPLACE FUNCTION limits_settle(
  lane_name text, caps double precision[], k double precision[], whose text,
  surplus double precision[], given double precision
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  now_at double precision := coalesce(given, extract(epoch FROM clock_timestamp()));
  here limits_lane := limits_lane_at(lane_name, caps, k, now_at);
BEGIN
  here := limits_move(here, whose, surplus, 1, limits_least(caps, here.learned), k, now_at);
  PERFORM limits_save(here);
END $$;
--;
CREATE OR REPLACE FUNCTION limits_correct(
  lane_name text, caps double precision[], k double precision[], seen double precision[],
  rest double precision[], blocked_for double precision, given double precision
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  now_at double precision := coalesce(given, extract(epoch FROM clock_timestamp()));
  here limits_lane := limits_lane_at(lane_name, caps, k, NULL);
BEGIN
  UPDATE limits_lane l
    SET learned = ARRAY(SELECT coalesce(seen[i], l.learned[i]) FROM generate_series(1, 3) i)
    WHERE l.name = lane_name;
  here := limits_lane_at(lane_name, caps, k, now_at);
  here.levels := limits_least(here.levels, rest);
  IF blocked_for > 0 THEN
    here.blocked := greatest(here.blocked, now_at + blocked_for);
  END IF;
  PERFORM limits_save(here);
END $$;
--;
DROP FUNCTION IF EXISTS limits_leave(text, text[], double precision, double precision);
--;
CREATE OR REPLACE FUNCTION limits_leave(
  lane_name text, caps double precision[], k double precision[], ids text[],
  park double precision, given double precision
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  now_at double precision := coalesce(given, extract(epoch FROM clock_timestamp()));
  here limits_lane := limits_lane_at(lane_name, caps, k, now_at);
BEGIN
  here := limits_back(here, ids, limits_least(caps, here.learned), k, now_at);
  PERFORM limits_save(here);
  IF park > 0 THEN
    UPDATE limits_ticket SET parked = true, granted = false, alive = now_at + park
      WHERE lane = lane_name AND id = ANY(ids);
  ELSE
    PERFORM limits_give_up(lane_name, ids, here.virtual);
  END IF;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_look(lane_name text) RETURNS jsonb LANGUAGE sql AS $$
  SELECT jsonb_build_object(
    'now', extract(epoch FROM clock_timestamp()),
    'lane', (SELECT to_jsonb(l) - 'name' FROM limits_lane l WHERE l.name = lane_name),
    'tenants', (SELECT coalesce(jsonb_object_agg(o.tenant, to_jsonb(o) - 'lane' - 'tenant'), '{}')
                FROM limits_tenant o WHERE o.lane = lane_name),
    'tickets', (SELECT coalesce(jsonb_object_agg(t.id, to_jsonb(t) - 'lane' - 'id'), '{}')
                FROM limits_ticket t WHERE t.lane = lane_name))
$$;
--;
CREATE OR REPLACE FUNCTION limits_paid(whose text, dollars double precision, count double precision)
RETURNS limits_budget LANGUAGE sql AS $$
  INSERT INTO limits_budget VALUES (whose, dollars, count)
  ON CONFLICT (key) DO UPDATE SET usd = limits_budget.usd + excluded.usd,
    tokens = limits_budget.tokens + excluded.tokens
  RETURNING *
$$;
--;
-- Holds are few acts beside requests that take seconds: one lock for all of them, in one order.
CREATE OR REPLACE FUNCTION limits_hold_for(hold_id text, charges jsonb, worst double precision[],
  likely double precision[], seconds double precision, given double precision
) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  now_at double precision := coalesce(given, extract(epoch FROM clock_timestamp()));
  charge jsonb;
  spent limits_budget;
  lapsed limits_hold;
  held double precision[];
  later text := '';
  usd double precision;
  most double precision;
BEGIN
  PERFORM pg_advisory_xact_lock(7233150904);
  DELETE FROM limits_lapsed WHERE until <= now_at;
  FOR lapsed IN DELETE FROM limits_hold WHERE until <= now_at RETURNING * LOOP
    PERFORM limits_paid(lapsed.key, lapsed.likely_usd, lapsed.likely_tokens);
    INSERT INTO limits_lapsed VALUES (
      lapsed.id, lapsed.key, lapsed.likely_usd, lapsed.likely_tokens, now_at + 86400);
  END LOOP;
  IF EXISTS (SELECT FROM limits_hold WHERE id = hold_id) THEN
    RETURN '["held", ""]';
  END IF;
  FOR charge IN SELECT * FROM jsonb_array_elements(charges) LOOP
    SELECT * INTO spent FROM limits_budget WHERE key = charge->>0;
    SELECT ARRAY[coalesce(sum(h.usd), 0.0), coalesce(sum(h.tokens), 0.0)] INTO held
      FROM limits_hold h WHERE h.key = charge->>0;
    usd := (charge->>1)::double precision + 1e-9;
    most := (charge->>2)::double precision + 1e-9;
    IF coalesce(spent.usd, 0.0) + worst[1] > usd OR coalesce(spent.tokens, 0.0) + worst[2] > most
    THEN
      RETURN jsonb_build_array('over', charge->>0);
    END IF;
    IF later = '' AND (coalesce(spent.usd, 0.0) + held[1] + worst[1] > usd
        OR coalesce(spent.tokens, 0.0) + held[2] + worst[2] > most) THEN
      later := charge->>0;
    END IF;
  END LOOP;
  IF later <> '' THEN
    RETURN jsonb_build_array('later', later);
  END IF;
  DELETE FROM limits_lapsed WHERE id = hold_id;
  INSERT INTO limits_hold SELECT hold_id, each->>0, worst[1], worst[2], likely[1], likely[2],
    now_at + seconds FROM jsonb_array_elements(charges) AS each;
  RETURN '["held", ""]';
END $$;
--;
CREATE OR REPLACE FUNCTION limits_pay(hold_id text, dollars double precision, count double precision)
RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
  found record;
  paid limits_budget;
  result jsonb := '[]';
BEGIN
  PERFORM pg_advisory_xact_lock(7233150904);
  FOR found IN
    WITH held AS (DELETE FROM limits_hold WHERE id = hold_id RETURNING key),
      late AS (DELETE FROM limits_lapsed WHERE id = hold_id RETURNING key, usd, tokens)
    SELECT key, 0.0::float8 AS usd, 0.0::float8 AS tokens FROM held
    UNION ALL SELECT key, usd, tokens FROM late
  LOOP
    paid := limits_paid(found.key, dollars - found.usd, count - found.tokens);
    result := result || jsonb_build_array(jsonb_build_array(paid.key, paid.usd, paid.tokens));
  END LOOP;
  RETURN result;
END $$;
--;
CREATE OR REPLACE FUNCTION limits_budgets() RETURNS jsonb LANGUAGE sql AS $$
  SELECT coalesce(jsonb_agg(jsonb_build_array(key, usd, tokens, held_usd, held_tokens)
                            ORDER BY key COLLATE "C"), '[]')
  FROM (
    SELECT key, sum(usd) AS usd, sum(tokens) AS tokens, sum(held_usd) AS held_usd,
      sum(held_tokens) AS held_tokens
    FROM (
      SELECT key, usd, tokens, 0.0::float8 AS held_usd, 0.0::float8 AS held_tokens
      FROM limits_budget
      UNION ALL SELECT key, 0.0, 0.0, usd, tokens FROM limits_hold
    ) AS each GROUP BY key
  ) AS summed
$$;
