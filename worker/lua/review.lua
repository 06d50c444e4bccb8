-- Keeps a review, unless its owner or all owners together would hold too many bytes, or the server is short of memory.
-- A review of the same image replaces the earlier one, whatever the bytes that this counts; one that counts no more fits
-- where the earlier one did.
-- KEYS reviews (sorted set of owner:id:bytes by the time they expire), review
-- ARGV owner, id, bytes that it counts, limit of its owner, limit of all, time to live, field, value, ...
-- returns 'own', 'all' or 'memory', or the times at which the review was created and expires
local now = clock()
local owner, size = ARGV[1], tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local own, all, earlier, earlier_size = size, size, nil, 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local name, id, bytes = string.match(member, '^([^:]*):([^:]*):(%d+)$')
  if name == owner and id == ARGV[2] then
    earlier, earlier_size = member, tonumber(bytes)
  else
    all = all + bytes
    if name == owner then own = own + bytes end
  end
end
if size > earlier_size then
  if own > tonumber(ARGV[4]) then return 'own' end
  if all > tonumber(ARGV[5]) then return 'all' end
  if short_of_memory() then return 'memory' end
end
if earlier then redis.call('ZREM', KEYS[1], earlier) end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[2], 'created_at', now, 'expires_at', now + ARGV[6], unpack(ARGV, 7))
local times = redis.call('HMGET', KEYS[2], 'created_at', 'expires_at')
redis.call('PEXPIREAT', KEYS[2], math.floor((now + ARGV[6]) * 1000))
redis.call('ZADD', KEYS[1], now + ARGV[6], table.concat({owner, ARGV[2], ARGV[3]}, ':'))
return times
