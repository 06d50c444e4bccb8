#!lua flags=allow-oom
-- Renews the leases of running jobs, publishes their progress, and returns the state of each lease.
-- Runs even if the server is out of memory, as cancel does; finish, requeue and claim free memory before they take any.
-- KEYS leases; ARGV lease_s, cap (entries in a progress stream), then id, token, event or '' for each job
-- returns for each job 'held', 'canceled' (its owner should end it) or 'lost' (another worker took it)
local now = clock()
local states, moved = {}, {}
for i = 3, #ARGV, 3 do
  local id, member = ARGV[i], ARGV[i] .. ':' .. ARGV[i + 1]
  if not redis.call('ZSCORE', KEYS[1], member) then
    states[#states + 1] = 'lost'
  else
    redis.call('ZADD', KEYS[1], now + ARGV[1], member)
    if ARGV[i + 2] ~= '' then
      append(id, ARGV[i + 2], ARGV[2])
      redis.pcall('HSET', 'rq:job:' .. id, 'progress', ARGV[i + 2])
      moved[#moved + 1] = id
    end
    states[#states + 1] = fields_of('rq:job:' .. id, 'cancel')[1] and 'canceled' or 'held'
  end
end
if #moved > 0 then redis.call('PUBLISH', 'ncml:changes:progress', table.concat(moved, ' ')) end
return states
