-- Ends a job, once: only the caller that removes it from its place ends it.
-- KEYS the place (leases, or a queue), job, events, blob, registry, wip
-- ARGV id, token ('' for a job in a queue), 1 to act on a lapsed lease only, ttl, status, event, blob,
--      field, value, ...
-- returns 1 if this call ended the job
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
-- the input is deleted, so that ended jobs are small; RQ requires the field
redis.call('HSET', KEYS[2], 'status', ARGV[5], 'ended', now, 'data', '', unpack(ARGV, 8))
redis.call('HDEL', KEYS[2], 'cancel')
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('XADD', KEYS[3], '*', 'event', ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[4])
if ARGV[7] ~= '' then redis.call('SET', KEYS[4], ARGV[7], 'EX', ARGV[4]) end
redis.call('PUBLISH', 'ncml:changes:state', id)
redis.call('ZADD', KEYS[5], now + ARGV[4], id)
redis.call('ZREMRANGEBYSCORE', KEYS[5], 0, now)
return 1
