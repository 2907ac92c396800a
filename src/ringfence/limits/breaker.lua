-- What ringfence.limits.breaker does, for Redis and Valkey. KEYS: breakers (a hash), budgets of
-- repeated requests (a hash). ARGV: the act, the time or '', the key, what the act needs.
local act, key = ARGV[1], ARGV[3]
local time = redis.call('TIME')
local now = tonumber(ARGV[2]) or (tonumber(time[1]) + tonumber(time[2]) / 1000000)
local function text(value) return string.format('%.17g', value) end
local function split(line)
  local parts = {}
  for part in string.gmatch(line .. '|', '([^|]*)|') do parts[#parts + 1] = part end
  return parts
end
if act == 'list' then return {redis.call('HGETALL', KEYS[1]), text(now)} end
if act == 'spend' then
  local share, reserve, trickle, earned =
    tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
  local line = redis.call('HGET', KEYS[2], key)
  local tokens, at = reserve, now
  if line then
    local p = split(line)
    tokens, at = tonumber(p[1]), tonumber(p[2])
  end
  tokens = math.min(reserve, tokens + math.max(0, now - at) * trickle + earned * share)
  local may = tokens >= 1
  if may then tokens = tokens - 1 end
  redis.call('HSET', KEYS[2], key, text(tokens) .. '|' .. text(now))
  return may and 1 or 0
end
local window, failures, share, opens, longest, most, lease, wins, in_a_row = tonumber(ARGV[4]),
  tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]),
  tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local probe = ARGV[13]
local back_of = '!' .. string.match(probe, '^[^/]*')
local line = redis.call('HGET', KEYS[1], key)
if act == 'note' and not line then
  local all = redis.call('HGETALL', KEYS[1])
  for i = 1, #all, 2 do
    local each = split(all[i + 1])
    local counted = math.max(tonumber(each[2]), (tonumber(each[5]) + 1) * window / 2)
    if each[1] == 'closed' and counted < now - 3600 then redis.call('HDEL', KEYS[1], all[i]) end
  end
end
local p = split(line or 'closed|0|0|0|0|0|0|0|0|0|0')
local state, since, untl, trips, slot, won, row = p[1], tonumber(p[2]), tonumber(p[3]),
  tonumber(p[4]), tonumber(p[5]), tonumber(p[10]), tonumber(p[11])
local fine, failed = {tonumber(p[6]), tonumber(p[7])}, {tonumber(p[8]), tonumber(p[9])}
local probes = {}
for i = 12, #p, 2 do probes[p[i]] = tonumber(p[i + 1]) end
local function save()
  local line = {state, text(since), text(untl), text(trips), text(slot), text(fine[1]),
    text(fine[2]), text(failed[1]), text(failed[2]), text(won), text(row)}
  for id, finish in pairs(probes) do
    line[#line + 1] = id
    line[#line + 1] = text(finish)
  end
  redis.call('HSET', KEYS[1], key, table.concat(line, '|'))
end
local function open()
  local before, seconds = state, math.min(longest, opens * 2 ^ math.min(trips, 30))
  state, since, untl, trips, won, probes = 'open', now, now + seconds, trips + 1, 0, {}
  save()
  return {'open', before, text(seconds)}
end
if act == 'admit' then
  local settled = tonumber(ARGV[14])
  if state == 'closed' then
    local left = settled - (now - since)
    if left > 0 and left <= settled then return {'no', 'closed', text(left), ''} end
    return {'go', 'closed', '0', ''}
  end
  local before, left = '', untl - now
  if state == 'open' then
    if left > 0 and left <= longest then return {'no', 'open', text(left), ''} end
    before, state, since, won, probes = 'open', 'half-open', now, 0, {}
  end
  local count, first = 0, nil
  for id, finish in pairs(probes) do
    if now >= finish or finish > now + lease then
      probes[id] = nil
    elseif string.sub(id, 1, 1) ~= '!' then
      count, first = count + 1, math.min(first or finish, finish)
    end
  end
  local back = probes[back_of]
  if back or (not probes[probe] and count >= most) then
    save()
    return {'no', 'half-open', text(math.min(1, (back or first) - now)), before}
  end
  probes[probe] = now + lease
  save()
  return {'probe', 'half-open', '0', before}
end
local ok = ARGV[14]
local mine = probes[probe] ~= nil
probes[probe] = nil
if ok == '' and mine and state == 'half-open' then
  probes[back_of] = now + math.min(5, lease)
elseif ok ~= '' and state == 'closed' then
  local at = math.floor(now / (window / 2))
  if at == slot + 1 then
    fine, failed = {0, fine[1]}, {0, failed[1]}
  elseif at ~= slot then
    fine, failed = {0, 0}, {0, 0}
  end
  slot = at
  local counts = ok == '1' and fine or failed
  counts[1] = counts[1] + 1
  row = ok == '1' and 0 or row + 1
  local bad, all = failed[1] + failed[2], failed[1] + failed[2] + fine[1] + fine[2]
  local many = bad >= failures and bad >= share * all
  if ok == '0' and (many or row >= in_a_row) then return open() end
elseif ok ~= '' and state == 'half-open' and mine then
  if ok == '0' then return open() end
  won = won + 1
  if won >= wins then
    state, since, untl, trips, won, probes = 'closed', now, 0, 0, 0, {}
    fine, failed, row = {0, 0}, {0, 0}, 0
    save()
    return {'closed', 'half-open', '0'}
  end
end
save()
return {state, '', '0'}
