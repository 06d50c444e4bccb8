-- Ends a job, once: whoever takes it out of the place where it stands is the one who ends it.
-- KEYS the place (leases, or a queue), job, events, blob, registry, wip
-- ARGV id, token ('' when it stands in a queue), 1 to act on a lapsed lease only, ttl, status, event, blob,
--      field, value, ...
-- returns 1 when this call ended the job
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local id, token = ARGV[1], ARGV[2]
if token == '' then
  if redis.call('LREM', KEYS[1], 1, id) == 0 then return 0 end
else
  local member = id .. ':' .. token
  local lease = redis.call('ZSCORE', KEYS[1], member)
  if not lease or (ARGV[3] == '1' and tonumber(lease) > now) then return 0 end
  redis.call('ZREM', KEYS[1], member)
  redis.call('ZREM', KEYS[6], member)
end
-- the input goes, so that finished jobs are small; RQ wants the field to exist
redis.call('HSET', KEYS[2], 'status', ARGV[5], 'ended', now, 'data', '', unpack(ARGV, 8))
redis.call('HDEL', KEYS[2], 'cancel')
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('XADD', KEYS[3], '*', 'event', ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[4])
if ARGV[7] ~= '' then redis.call('SET', KEYS[4], ARGV[7], 'EX', ARGV[4]) end
redis.call('ZADD', KEYS[5], now + ARGV[4], id)
redis.call('ZREMRANGEBYSCORE', KEYS[5], 0, now)
return 1
