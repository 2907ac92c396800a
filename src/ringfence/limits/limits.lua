-- What ringfence.limits.lane does, for Redis and Valkey: one script, so that nothing comes between.
-- KEYS: the lane's hash, its tenants', its tickets'. ARGV: the act, the time or '', the lane's
-- caps (3), burst, fill, window, batch share, patience, and what the act needs. A value that is
-- none is ''; numbers are written so that a double comes back as it was.
local act, given = ARGV[1], ARGV[2]
local burst, fill, window = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local batch_share, patience = tonumber(ARGV[9]), tonumber(ARGV[10])
local time = redis.call('TIME')
local now = tonumber(given) or (tonumber(time[1]) + tonumber(time[2]) / 1000000)

local function text(value)
  if value == nil or value == false then return '' end
  if type(value) == 'number' then return string.format('%.17g', value) end
  return tostring(value)
end
local function split(line)
  local parts = {}
  for part in string.gmatch(line .. '|', '([^|]*)|') do parts[#parts + 1] = part end
  return parts
end
local function least(one, other)
  if one == nil then return other end
  if other == nil then return one end
  return math.min(one, other)
end
local function capacity(cap, metric)
  if metric == 1 then return math.max(cap * burst, 1.0) end
  return cap * burst
end
local function levels_at(levels, caps, seconds)
  local grown = {}
  for i = 1, 3 do
    if caps[i] ~= nil then
      local full = capacity(caps[i], i)
      if levels[i] == nil then grown[i] = full
      else
        local rate = caps[i] * fill / window
        grown[i] = math.min(full, levels[i] + rate * math.max(0, seconds))
      end
    end
  end
  return grown
end
local function moved(levels, by, sign, caps)
  local new = {}
  for i = 1, 3 do
    if levels[i] ~= nil and caps[i] ~= nil then
      new[i] = math.min(capacity(caps[i], i), levels[i] + sign * by[i])
    end
  end
  return new
end
local function fits(levels, amount, caps)
  for i = 1, 3 do
    if levels[i] ~= nil and caps[i] ~= nil
      and levels[i] + 1e-9 < math.min(amount[i], capacity(caps[i], i)) then return false end
  end
  return true
end

local own = {tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])}
local read = redis.call('HMGET', KEYS[1], 'at', 'l1', 'l2', 'l3', 'm1', 'm2', 'm3', 'blocked',
  'seq', 'served', 'f0', 'f1', 'v0', 'v1')
local n = {}
for i = 1, 14 do n[i] = tonumber(read[i] or '') end
local lane = {
  at = n[1] or 0, levels = {n[2], n[3], n[4]}, learned = {n[5], n[6], n[7]},
  blocked = n[8] or 0, seq = n[9] or 0, served = n[10] or 0,
  finish = {n[11] or 0, n[12] or 0}, virtual = {n[13] or 0, n[14] or 0},
}
local caps = {}
local tenants, tickets = {}, {}
local read_tenant, keep_tenant, read_ticket, keep_ticket
local function read_tickets()
  local flat = redis.call('HGETALL', KEYS[3])
  for i = 1, #flat, 2 do tickets[flat[i]] = read_ticket(flat[i], flat[i + 1]) end
end
-- see lane._set_back
local function set_back()
  local ahead = lane.at - now
  lane.at, lane.blocked = now, lane.blocked - ahead
  local flat = redis.call('HGETALL', KEYS[2])
  for i = 1, #flat, 2 do
    tenants[flat[i]] = read_tenant(flat[i + 1])
    tenants[flat[i]].at = math.min(tenants[flat[i]].at, now)
    keep_tenant(flat[i])
  end
  read_tickets()
  for _, ticket in pairs(tickets) do
    ticket.alive, ticket.since = ticket.alive - ahead, ticket.since - ahead
    keep_ticket(ticket)
  end
end
local function refill()
  if lane.at - now > window then set_back() end
  for i = 1, 3 do caps[i] = least(own[i], lane.learned[i]) end
  lane.levels = levels_at(lane.levels, caps, now - lane.at)
  lane.at = math.max(lane.at, now)
end
local function save()
  local l, m = lane.levels, lane.learned
  redis.call('HSET', KEYS[1], 'at', text(lane.at), 'l1', text(l[1]), 'l2', text(l[2]),
    'l3', text(l[3]), 'm1', text(m[1]), 'm2', text(m[2]), 'm3', text(m[3]),
    'blocked', text(lane.blocked), 'seq', text(lane.seq), 'served', text(lane.served),
    'f0', text(lane.finish[1]), 'f1', text(lane.finish[2]),
    'v0', text(lane.virtual[1]), 'v1', text(lane.virtual[2]))
end

function read_tenant(line)
  local p = split(line)
  return {
    at = tonumber(p[1]), caps = {tonumber(p[2]), tonumber(p[3]), tonumber(p[4])},
    levels = {tonumber(p[5]), tonumber(p[6]), tonumber(p[7])},
    finish = {tonumber(p[8]), tonumber(p[9])},
  }
end
local function tenant_of(name)
  if tenants[name] == nil then
    local line = redis.call('HGET', KEYS[2], name)
    if not line then return nil end
    tenants[name] = read_tenant(line)
  end
  return tenants[name]
end
function keep_tenant(name)
  local t = tenants[name]
  redis.call('HSET', KEYS[2], name, table.concat({
    text(t.at), text(t.caps[1]), text(t.caps[2]), text(t.caps[3]),
    text(t.levels[1]), text(t.levels[2]), text(t.levels[3]),
    text(t.finish[1]), text(t.finish[2])}, '|'))
end
local function filled(t) return levels_at(t.levels, t.caps, now - t.at) end
local function move_tenant(name, by, sign)
  local t = tenant_of(name)
  if t == nil then return end
  t.levels = moved(filled(t), by, sign, t.caps)
  t.at = math.max(t.at, now)
  keep_tenant(name)
end

function read_ticket(id, line)
  local p = split(line)
  return {
    id = id, tenant = p[1], batch = tonumber(p[2]), start = tonumber(p[3]), seq = tonumber(p[4]),
    amount = {tonumber(p[5]), tonumber(p[6]), tonumber(p[7])}, share = tonumber(p[8]),
    weight = tonumber(p[9]), alive = tonumber(p[10]), since = tonumber(p[11]),
    parked = p[12] == '1', granted = p[13] == '1',
  }
end
function keep_ticket(t)
  redis.call('HSET', KEYS[3], t.id, table.concat({
    t.tenant, text(t.batch), text(t.start), text(t.seq), text(t.amount[1]), text(t.amount[2]),
    text(t.amount[3]), text(t.share), text(t.weight), text(t.alive), text(t.since),
    t.parked and '1' or '0', t.granted and '1' or '0'}, '|'))
end

local function waits(t) return not t.parked and not t.granted end
local function move(name, by, sign)
  lane.levels = moved(lane.levels, by, sign, caps)
  move_tenant(name, by, sign)
end

-- see lane._give_up
local function give_up(gone)
  table.sort(gone, function(one, other) return one.seq > other.seq end)
  for _, ticket in ipairs(gone) do
    tickets[ticket.id] = nil
    redis.call('HDEL', KEYS[3], ticket.id)
    local class, share = ticket.batch + 1, ticket.share / ticket.weight
    local function up(place)
      return math.max(place - share, math.min(place, lane.virtual[class]))
    end
    if ticket.granted then
      move(ticket.tenant, ticket.amount, 1)
    else
      local tenant = tenant_of(ticket.tenant)
      tenant.finish[class] = up(tenant.finish[class])
      keep_tenant(ticket.tenant)
      for _, each in pairs(tickets) do
        if each.tenant == ticket.tenant and each.batch == ticket.batch and each.seq > ticket.seq
        then
          each.start, each.moved = up(each.start), true
        end
      end
    end
  end
  for _, each in pairs(tickets) do
    if each.moved then keep_ticket(each) end
  end
end

if act == 'settle' then
  refill()
  local over = {tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])}
  move(ARGV[11], over, 1)
  save()
  return 'OK'
elseif act == 'correct' then
  for i = 1, 3 do lane.learned[i] = tonumber(ARGV[10 + i]) or lane.learned[i] end
  refill()
  for i = 1, 3 do lane.levels[i] = least(lane.levels[i], tonumber(ARGV[13 + i])) end
  local blocked = tonumber(ARGV[17])
  if blocked > 0 then lane.blocked = math.max(lane.blocked, now + blocked) end
  save()
  return 'OK'
elseif act == 'leave' then
  local park = tonumber(ARGV[11])
  refill()
  read_tickets()
  local gone, known = {}, {}
  for i = 12, #ARGV do
    local ticket = tickets[ARGV[i]]
    if ticket and park > 0 then
      if ticket.granted then move(ticket.tenant, ticket.amount, 1) end
      ticket.parked, ticket.granted, ticket.alive = true, false, now + park
      keep_ticket(ticket)
    elseif ticket and not known[ticket.id] then
      known[ticket.id] = true
      gone[#gone + 1] = ticket
    end
  end
  give_up(gone)
  save()
  return 'OK'
elseif act == 'look' then
  return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]),
    redis.call('HGETALL', KEYS[3]), text(now)}
end

-- take
refill()
read_tickets()
local dead = {}
for _, ticket in pairs(tickets) do
  if ticket.alive <= now then dead[#dead + 1] = ticket end
end
give_up(dead)

-- what others' asking has served of this process: see lane.take
local mine, served, granted, left = {}, {}, {}, {}
for at = 11, #ARGV, 11 do mine[ARGV[at]] = at end
for id, at in pairs(mine) do
  if tickets[id] and tickets[id].granted then served[#served + 1] = tickets[id] end
end
table.sort(served, function(one, other) return one.seq < other.seq end)
for _, ticket in ipairs(served) do
  local at, more = mine[ticket.id], {}
  for i = 1, 3 do more[i] = ticket.amount[i] - tonumber(ARGV[at + 4 + i]) end
  move(ticket.tenant, more, 1)
  tickets[ticket.id], mine[ticket.id] = nil, nil
  redis.call('HDEL', KEYS[3], ticket.id)
  granted[#granted + 1] = ticket.id
end
for at = 11, #ARGV, 11 do
  if mine[ARGV[at]] then left[#left + 1] = at end
end
for _, at in ipairs(left) do
  local id, name, batch = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local wanted = {tonumber(ARGV[at + 8]), tonumber(ARGV[at + 9]), tonumber(ARGV[at + 10])}
  local tenant, changed = tenant_of(name), false
  if tenant == nil then
    tenant = {at = now, caps = {}, levels = {}, finish = {0, 0}}
    tenants[name], changed = tenant, true
  end
  for i = 1, 3 do changed = changed or tenant.caps[i] ~= wanted[i] end
  if changed then
    tenant.levels, tenant.at = filled(tenant), math.max(tenant.at, now)
    tenant.caps = wanted
    keep_tenant(name)
  end
  local ticket = tickets[id]
  local share, weight = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local amount = {tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6]), tonumber(ARGV[at + 7])}
  if ticket then
    local class = ticket.batch + 1
    tenant.finish[class] = tenant.finish[class] + (share - ticket.share) / ticket.weight
    if share ~= ticket.share then keep_tenant(name) end
    ticket.amount, ticket.share = amount, share
    ticket.alive, ticket.parked = now + patience, false
  else
    local alone = true
    for _, each in pairs(tickets) do
      if each.batch == batch and waits(each) then alone = false end
    end
    if alone then lane.finish[batch + 1] = math.max(lane.finish[batch + 1], lane.served) end
    local start = math.max(lane.virtual[batch + 1], tenant.finish[batch + 1])
    tenant.finish[batch + 1] = start + share / weight
    keep_tenant(name)
    lane.seq = lane.seq + 1
    ticket = {
      id = id, tenant = name, batch = batch, start = start, seq = lane.seq, share = share,
      amount = amount, weight = weight, alive = now + patience, since = now, parked = false,
      granted = false,
    }
    tickets[id] = ticket
    if lane.seq % 64 == 0 then
      local here = {}
      for _, each in pairs(tickets) do here[each.tenant] = true end
      local all = redis.call('HGETALL', KEYS[2])
      for i = 1, #all, 2 do
        if not here[all[i]] and tonumber(split(all[i + 1])[1]) <= now - 3600 then
          redis.call('HDEL', KEYS[2], all[i])
          tenants[all[i]] = nil
        end
      end
    end
  end
  ticket.fresh = true
end

local order = {}
for _, ticket in pairs(tickets) do
  if waits(ticket) then order[#order + 1] = ticket end
end
table.sort(order, function(one, other)
  if one.batch ~= other.batch then return one.batch < other.batch end
  if one.start ~= other.start then return one.start < other.start end
  return one.seq < other.seq
end)

-- when the class of a ticket begins and ends to serve it: see lane._class_turn
local function class_turn(ticket)
  local cost = ticket.share / (ticket.batch == 1 and batch_share or 1 - batch_share)
  local start = math.max(lane.finish[ticket.batch + 1], lane.served - cost)
  return start, start + cost
end

while lane.blocked <= now do
  local first = {}
  for _, ticket in ipairs(order) do
    if not ticket.gone and first[ticket.batch] == nil then
      local tenant = tenant_of(ticket.tenant)
      if fits(filled(tenant), ticket.amount, tenant.caps) then first[ticket.batch] = ticket end
    end
  end
  local head = first[0] or first[1]
  if head == nil then break end
  if first[0] and first[1] then
    local _, batch = class_turn(first[1])
    local _, interactive = class_turn(first[0])
    if batch < interactive then head = first[1] end
  end
  if not fits(lane.levels, head.amount, caps) then break end
  head.gone, head.granted = true, true
  if mine[head.id] then
    redis.call('HDEL', KEYS[3], head.id)
    granted[#granted + 1] = head.id
  else
    keep_ticket(head)
  end
  move(head.tenant, head.amount, -1)
  local class = head.batch + 1
  local start, finish = class_turn(head)
  lane.served, lane.finish[class] = math.max(lane.served, start), finish
  lane.virtual[class] = math.max(lane.virtual[class], head.start)
end

local waiting, every, class, of, place = {}, {0, 0, 0}, {0, 0, 0}, {}, 0
for _, ticket in ipairs(order) do
  if not ticket.gone then
    place = place + 1
    local its = of[ticket.tenant] or {0, 0, 0}
    of[ticket.tenant] = its
    -- batch waits for all, or for its share: see lane.standing
    local ahead = {}
    for i = 1, 3 do
      every[i], its[i] = every[i] + ticket.amount[i], its[i] + ticket.amount[i]
      ahead[i] = every[i]
      if ticket.batch == 1 then
        class[i] = class[i] + ticket.amount[i]
        ahead[i] = math.min(every[i], class[i] / batch_share)
      end
    end
    if mine[ticket.id] then
      if ticket.fresh then keep_ticket(ticket) end
      local l = filled(tenant_of(ticket.tenant))
      waiting[#waiting + 1] = {ticket.id, text(place), text(ahead[1]), text(ahead[2]),
        text(ahead[3]), text(its[1]), text(its[2]), text(its[3]), text(l[1]), text(l[2]),
        text(l[3])}
    end
  end
end
save()
local l = lane.levels
return {granted, waiting, {text(l[1]), text(l[2]), text(l[3])},
  {text(caps[1]), text(caps[2]), text(caps[3])}, text(math.max(0, lane.blocked - now))}
