-- Moves compatible jobs from their queues to the leases, in one step: no job is ever between the two.
--
-- The first job determines the batch key; others with that key join while their images fit, in order of priority and
-- then of arrival. A job marked `alone` is a batch by itself. Jobs that are too late to start are moved too and marked,
-- so that the caller ends them. Ids that are not jobs are removed.
--
-- KEYS leases, then the queues in priority order
-- ARGV token, lease_s, worker, room (images), scan (jobs inspected in each queue), batch key or '', event
-- returns batch key ('' when nothing more may join), then for each job {id, queue, late, attempts, images, seconds waited, data, batch key, traceparent}
local now = clock()
local token, room, scan, batch_key = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local claimed, started, taken, closed = {}, {}, 0, false

local function claim(queue, id, job, n, late, key)
  leave_queue(queue, id, job)
  redis.call('ZADD', KEYS[1], now + ARGV[2], id .. ':' .. token)
  redis.call('ZADD', 'rq:wip:' .. string.sub(queue, 10), '+inf', id .. ':' .. token)
  redis.call('HSET', job, 'status', 'started', 'started', now, 'worker_name', ARGV[3])
  local attempts = redis.pcall('HINCRBY', job, 'attempts', 1)
  if type(attempts) ~= 'number' then
    attempts = 1
    redis.call('HSET', job, 'attempts', 1)
  end
  redis.call('PERSIST', job)
  if not late then
    append(id, ARGV[7])
    redis.call('PERSIST', 'ncml:events:' .. id)
    started[#started + 1] = id
  end
  local fields = redis.call('HMGET', job, 'submitted', 'data', 'traceparent')
  local waited = tostring(now - (tonumber(fields[1]) or now))
  claimed[#claimed + 1] = {id, string.sub(queue, 10), late and 1 or 0, attempts, n, waited, not late and fields[2] or '', key, fields[3] or ''}
end

for k = 2, #KEYS do
  for _, id in ipairs(redis.call('LRANGE', KEYS[k], 0, scan - 1)) do
    if closed then break end
    local job = 'rq:job:' .. id
    local record = fields_of(job, 'status', 'batch_key', 'n', 'alone', 'start_by')
    local status, key, n, start_by = record[1], record[2] or '', tonumber(record[3]), tonumber(record[5])
    local alone = record[4] == '1' or key == ''
    n = n and n >= 1 and n < 1e6 and math.floor(n) or 1
    if status ~= 'queued' or not string.match(id, '^[%w_-]+$') then
      leave_queue(KEYS[k], id, job)
    elseif start_by and start_by < now then
      claim(KEYS[k], id, job, n, true, key)
    elseif batch_key == '' then
      claim(KEYS[k], id, job, n, false, key)
      batch_key, taken = key, n
      closed = alone or taken >= room
    elseif key == batch_key and not alone and taken + n <= room then
      claim(KEYS[k], id, job, n, false, key)
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
