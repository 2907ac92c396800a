-- What ringfence.limits.budget does, for Redis and Valkey. KEYS: what is spent (a hash), holds (a
-- hash), when each hold lapses (a sorted set), lapsed ones that can still be put right (a hash), and
-- until when (a sorted set). ARGV: the act, the time or '', what it needs.
local act, given = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = tonumber(given) or (tonumber(time[1]) + tonumber(time[2]) / 1000000)
local function text(value) return string.format('%.17g', value) end
local function split(line)
  local parts = {}
  for part in string.gmatch(line .. '|', '([^|]*)|') do parts[#parts + 1] = part end
  return parts
end
local function spent_of(key)
  local p = split(redis.call('HGET', KEYS[1], key) or '0|0')
  return tonumber(p[1]), tonumber(p[2])
end
-- Without a sum it is paid by what was likely, which is kept.
local function pay(id, usd, tokens)
  local line, paid, lapsed = redis.call('HGET', KEYS[2], id), {}, false
  if not line then line, lapsed = redis.call('HGET', KEYS[4], id), true end
  if not line then return paid end
  local p = split(line)
  if lapsed then usd, tokens = usd - tonumber(p[3]), tokens - tonumber(p[4]) end
  for i = 5, #p do
    local had_usd, had_tokens = spent_of(p[i])
    local new_usd, new_tokens = text(had_usd + (usd or tonumber(p[3]))),
      text(had_tokens + (tokens or tonumber(p[4])))
    redis.call('HSET', KEYS[1], p[i], new_usd .. '|' .. new_tokens)
    paid[#paid + 1] = {p[i], new_usd, new_tokens}
  end
  redis.call('HDEL', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  if lapsed then
    redis.call('HDEL', KEYS[4], id)
    redis.call('ZREM', KEYS[5], id)
  elseif usd == nil then
    redis.call('HSET', KEYS[4], id, line)
    redis.call('ZADD', KEYS[5], text(now + 86400), id)
  end
  return paid
end
if act == 'pay' then return pay(ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])) end
if act == 'standing' then
  return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2])}
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '-inf', text(now))) do
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZREM', KEYS[5], id)
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', text(now))) do pay(id) end
local id, seconds = ARGV[3], tonumber(ARGV[4])
local worst = {tonumber(ARGV[5]), tonumber(ARGV[6])}
if redis.call('HEXISTS', KEYS[2], id) == 1 then return {'held', ''} end
local held, flat = {}, redis.call('HGETALL', KEYS[2])
for i = 2, #flat, 2 do
  local p = split(flat[i])
  for j = 5, #p do
    local sum = held[p[j]] or {0, 0}
    held[p[j]] = {sum[1] + tonumber(p[1]), sum[2] + tonumber(p[2])}
  end
end
local function over(cap, value) return cap ~= nil and value > cap + 1e-9 end
local keys, later = {}, ''
for i = 9, #ARGV, 3 do
  local key, usd, tokens = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local had_usd, had_tokens = spent_of(key)
  local sum = held[key] or {0, 0}
  if over(usd, had_usd + worst[1]) or over(tokens, had_tokens + worst[2]) then
    return {'over', key}
  end
  if later == '' and (over(usd, had_usd + sum[1] + worst[1])
    or over(tokens, had_tokens + sum[2] + worst[2])) then later = key end
  keys[#keys + 1] = key
end
if later ~= '' then return {'later', later} end
redis.call('HDEL', KEYS[4], id)
redis.call('ZREM', KEYS[5], id)
redis.call('HSET', KEYS[2], id, table.concat({ARGV[5], ARGV[6], ARGV[7], ARGV[8],
  unpack(keys)}, '|'))
redis.call('ZADD', KEYS[3], text(now + seconds), id)
return {'held', ''}
