-- Moves compatible jobs from their queues to the leases, in one step: no job is ever between the two.
--
-- The first job determines the batch key; others with that key join while their images fit, in order of priority and
-- then of arrival. A job marked `alone` is a batch by itself. Jobs that are too late to start are moved too and marked,
-- so that the caller ends them.
--
-- KEYS leases, then the queues in priority order
-- ARGV token, lease_s, worker, ttl, room (images), scan (jobs inspected in each queue), batch key or '', event
-- returns batch key ('' when nothing more may join), then for each job {id, queue, late, attempts, images, seconds waited, data}
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local token, room, scan, batch_key = ARGV[1], tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local claimed, started, taken, closed = {}, {}, 0, false

local function claim(queue, id, job, n, late)
  redis.call('LREM', queue, 1, id)
  redis.call('ZADD', KEYS[1], now + ARGV[2], id .. ':' .. token)
  redis.call('ZADD', 'rq:wip:' .. string.sub(queue, 10), '+inf', id .. ':' .. token)
  redis.call('HSET', job, 'status', 'started', 'started', now, 'worker_name', ARGV[3])
  local attempts = redis.call('HINCRBY', job, 'attempts', 1)
  redis.call('PERSIST', job)
  if not late then
    redis.call('XADD', 'ncml:events:' .. id, '*', 'event', ARGV[8])
    redis.call('EXPIRE', 'ncml:events:' .. id, ARGV[4])
    started[#started + 1] = id
  end
  local fields = redis.call('HMGET', job, 'submitted', 'data')
  local waited = tostring(now - (tonumber(fields[1]) or now))
  claimed[#claimed + 1] = {id, string.sub(queue, 10), late and 1 or 0, attempts, n, waited, fields[2] or ''}
end

for k = 2, #KEYS do
  for _, id in ipairs(redis.call('LRANGE', KEYS[k], 0, scan - 1)) do
    if closed then break end
    local job = 'rq:job:' .. id
    local h = redis.call('HMGET', job, 'status', 'batch_key', 'n', 'alone', 'start_by')
    local n, alone = tonumber(h[3]) or 1, h[4] == '1' or not h[2]
    if h[1] ~= 'queued' then
      redis.call('LREM', KEYS[k], 1, id)
    elseif h[5] and tonumber(h[5]) < now then
      claim(KEYS[k], id, job, n, true)
    elseif batch_key == '' then
      claim(KEYS[k], id, job, n, false)
      batch_key, taken = h[2] or '', n
      closed = alone or taken >= room
    elseif h[2] == batch_key and not alone and taken + n <= room then
      claim(KEYS[k], id, job, n, false)
      taken = taken + n
      closed = taken >= room
    end
  end
end

if #started > 0 then redis.call('PUBLISH', 'ncml:changes:state', table.concat(started, ' ')) end

for k = 2, #KEYS do -- wake another idle worker for the remaining jobs
  local wake = 'ncml:wake:' .. string.match(KEYS[k], 'ncml:(%a+):')
  if redis.call('LLEN', KEYS[k]) > 0 and redis.call('LLEN', wake) == 0 then redis.call('RPUSH', wake, 1) end
end
return {closed and '' or batch_key, claimed}
