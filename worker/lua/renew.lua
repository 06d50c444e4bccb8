#!lua flags=allow-oom
-- Renews the leases of running jobs, publishes their progress, and returns their standing.
-- Runs even if the server is out of memory (the other scripts first free memory, which allows them to run too).
-- KEYS leases; ARGV lease_s, ttl, cap (entries in a progress stream), then id, token, event or '' for each job
-- returns for each job 'held', 'canceled' (its owner should end it) or 'lost' (another worker took it)
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local states, moved = {}, {}
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
      moved[#moved + 1] = id
    end
    redis.call('EXPIRE', events, ARGV[2])
    states[#states + 1] = redis.call('HGET', 'rq:job:' .. id, 'cancel') and 'canceled' or 'held'
  end
end
if #moved > 0 then redis.call('PUBLISH', 'ncml:changes:progress', table.concat(moved, ' ')) end
return states
