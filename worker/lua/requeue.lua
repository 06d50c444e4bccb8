-- Puts a leased job back at the front of its queue, or ends it if its cancellation was accepted.
-- KEYS leases, job, queue, wake, wip
-- ARGV id, token, 1 to act on a lapsed lease only, 1 to run alone from now on, 1 not to count the attempt, event,
--      ttl, event and error of a canceled job
-- returns 1 if this call put it back
local member = ARGV[1] .. ':' .. ARGV[2]
local lease = redis.call('ZSCORE', KEYS[1], member)
if not lease or (ARGV[3] == '1' and tonumber(lease) > clock()) then return 0 end
redis.call('ZREM', KEYS[1], member)
redis.call('ZREM', KEYS[5], member)
if fields_of(KEYS[2], 'cancel')[1] then
  end_canceled(ARGV[1], KEYS[2], string.sub(KEYS[3], 10), ARGV[7], ARGV[8], ARGV[9])
  return 0
end
redis.call('HSET', KEYS[2], 'status', 'queued')
redis.call('HDEL', KEYS[2], 'progress')
local times = fields_of(KEYS[2], 'started', 'start_by')
local started, start_by = tonumber(times[1]), tonumber(times[2])
if not (started and start_by and started > start_by) then redis.call('HDEL', KEYS[2], 'start_by') end -- it started in time
if ARGV[4] == '1' then redis.call('HSET', KEYS[2], 'alone', '1') end
if ARGV[5] == '1' then redis.call('HINCRBY', KEYS[2], 'attempts', -1) end
append(ARGV[1], ARGV[6])
redis.call('PUBLISH', 'ncml:changes:state', ARGV[1])
redis.call('LPUSH', KEYS[3], ARGV[1])
count_bytes(KEYS[3], KEYS[2], 1)
if redis.call('LLEN', KEYS[4]) == 0 then redis.call('RPUSH', KEYS[4], 1) end
return 1
