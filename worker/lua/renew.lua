#!lua flags=allow-oom
-- Keeps the leases of running jobs, publishes their progress, and says what became of them.
-- Done even when the server is out of memory (the other scripts begin by taking something away, which lets them too).
-- KEYS leases; ARGV lease_s, ttl, cap (entries in a progress stream), then id, token, event or '' for each job
-- returns for each job 'held', 'canceled' (its owner should end it) or 'lost' (it is somebody else's now)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local states = {}
for i = 4, #ARGV, 3 do
  local id, member = ARGV[i], ARGV[i] .. ':' .. ARGV[i + 1]
  if not redis.call('ZSCORE', KEYS[1], member) then
    states[#states + 1] = 'lost'
  else
    redis.call('ZADD', KEYS[1], now + ARGV[1], member)
    local events = 'ncml:events:' .. id
    if ARGV[i + 2] ~= '' then
      redis.call('XADD', events, 'MAXLEN', ARGV[3], '*', 'event', ARGV[i + 2])
      redis.call('HSET', 'rq:job:' .. id, 'progress', ARGV[i + 2])
    end
    redis.call('EXPIRE', events, ARGV[2])
    states[#states + 1] = redis.call('HGET', 'rq:job:' .. id, 'cancel') and 'canceled' or 'held'
  end
end
return states
