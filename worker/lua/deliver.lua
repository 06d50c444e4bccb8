#!lua flags=allow-oom
-- Claims deliveries of webhooks that are due, few of one receiver at a time for all services together, in one step.
--
-- Runs even if the server is out of memory: what is sent frees memory.
-- A claim is a lease: if the service that holds it dies, the delivery is due again. Receivers come in the order of
-- their oldest due deliveries.
--
-- KEYS receivers; ARGV token, lease_s, room, room of one receiver
-- returns for each delivery {receiver, id, fields of its record}
local now, room, claimed = clock(), tonumber(ARGV[3]), {}
local receivers = {}
for _, receiver in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local due, sending = 'ncml:deliveries:' .. receiver, 'ncml:sending:' .. receiver
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', sending, '-inf', now)) do
    redis.call('ZREM', sending, member)
    redis.call('ZADD', due, now, string.match(member, '^[^:]*'))
  end
  local first = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
  local busy = redis.call('ZCARD', sending)
  if first[2] and tonumber(first[2]) <= now and busy < tonumber(ARGV[4]) then
    receivers[#receivers + 1] = {receiver, tonumber(first[2]), tonumber(ARGV[4]) - busy}
  elseif not first[2] and busy == 0 then
    redis.call('SREM', KEYS[1], receiver)
  end
end
table.sort(receivers, function(a, b) return a[2] < b[2] end)

for _, entry in ipairs(receivers) do
  local due, sending = 'ncml:deliveries:' .. entry[1], 'ncml:sending:' .. entry[1]
  local limit = math.min(entry[3], room - #claimed)
  for _, id in ipairs(limit > 0 and redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, limit) or {}) do
    local record = 'ncml:delivery:' .. id
    redis.call('ZREM', due, id)
    if redis.call('TYPE', record).ok == 'hash' then -- it has not expired
      redis.call('ZADD', sending, now + ARGV[2], id .. ':' .. ARGV[1])
      redis.call('HINCRBY', record, 'webhook_attempts', 1)
      claimed[#claimed + 1] = {entry[1], id, redis.call('HGETALL', record)}
    end
  end
end
return claimed
