-- Moves compatible jobs from their queues to the leases, in one step: no job is ever between the two.
--
-- The first job determines the batch key; others with that key join while their images fit, in order of priority and
-- then of arrival. A job marked `alone` is a batch by itself; a claim of jobs that share the engine leaves it in its
-- queue. Jobs that are too late to start are moved too and marked, so that the caller ends them. Ids that are not jobs
-- are removed.
--
-- Jobs for models that other workers of the lane serve, and this one does not, stay in their queues; those behind them
-- are claimed. Jobs for models that no worker serves are claimed and marked, so that the caller ends them; but they stay
-- where they are while other workers may not have published again what had lapsed (see `publish`).
--
-- KEYS leases, workers, then the queues in priority order
-- ARGV token, lease_s, worker, room (images), scan and reach (jobs inspected in each queue, without and with those that
--      are left), batch key or '', event, 1 to leave jobs marked `alone`
-- returns batch key ('' when nothing more may join), how many jobs were left, then for each job
--      {id, queue, late, attempts, images, seconds waited, data, batch key, traceparent, whether a worker serves its model}
local now = clock()
local token, room, scan, reach, batch_key = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local claimed, started, taken, closed, left = {}, {}, 0, false, 0

local function serves(lane, worker, model) -- not if the key has another type
  return redis.pcall('SISMEMBER', 'ncml:serving:' .. lane .. ':' .. worker, model) == 1
end

local function is_settling()
  if redis.call('EXISTS', 'ncml:settling') == 1 then return true end
  local was_published = redis.pcall('ZSCORE', KEYS[2], ARGV[3])
  return type(was_published) == 'string' and redis.call('EXISTS', 'ncml:worker:' .. ARGV[3]) == 0
end

local servers = {}
local function server_of(lane, model) -- 'self', 'other' or 'none'
  local key = lane .. ':' .. model
  if servers[key] then return servers[key] end
  if serves(lane, ARGV[3], model) then
    servers[key] = 'self'
  else
    servers[key] = is_settling() and 'other' or 'none'
    local workers = redis.pcall('ZRANGE', KEYS[2], 0, -1)
    for _, worker in ipairs(workers.err and {} or workers) do
      if serves(lane, worker, model) then servers[key] = 'other' end
    end
  end
  return servers[key]
end

local function claim(queue, id, job, n, late, key, server)
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
    append(id, ARGV[8])
    redis.call('PERSIST', 'ncml:events:' .. id)
    started[#started + 1] = id
  end
  local fields = redis.call('HMGET', job, 'submitted', 'data', 'traceparent')
  local waited = tostring(now - (tonumber(fields[1]) or now))
  claimed[#claimed + 1] = {id, string.sub(queue, 10), late and 1 or 0, attempts, n, waited, not late and fields[2] or '', key, fields[3] or '', server == 'none' and 0 or 1}
end

-- Returns whether the job still waits in the queue, and whether it is left there for another worker or until later.
local function inspect(queue, id)
  local job = 'rq:job:' .. id
  local record = fields_of(job, 'status', 'batch_key', 'n', 'alone', 'start_by', 'model', 'version')
  local status, key, n, start_by = record[1], record[2] or '', tonumber(record[3]), tonumber(record[5])
  local alone = record[4] == '1' or key == ''
  n = n and n >= 1 and n < 1e6 and math.floor(n) or 1
  if status ~= 'queued' or not string.match(id, '^[%w_-]+$') then
    leave_queue(queue, id, job)
    return false, false
  elseif start_by and start_by < now then
    claim(queue, id, job, n, true, key, 'self')
    return false, false
  elseif alone and ARGV[9] == '1' then
    return true, true
  end
  local model = (record[6] or '') .. (record[7] and '@' .. record[7] or '')
  local server = server_of(string.match(queue, 'ncml:(%a+):'), model)
  if server == 'other' then return true, true end
  if batch_key == '' then
    claim(queue, id, job, n, false, key, server)
    batch_key, taken = key, n
    closed = alone or taken >= room
    return false, false
  elseif key == batch_key and not alone and taken + n <= room then
    claim(queue, id, job, n, false, key, server)
    taken = taken + n
    closed = taken >= room
    return false, false
  end
  return true, false
end

for k = 3, #KEYS do
  local start, inspected, page = 0, 0, nil
  repeat
    page = redis.call('LRANGE', KEYS[k], start, start + scan - 1)
    for _, id in ipairs(page) do
      if closed then break end
      local waits, is_left = inspect(KEYS[k], id)
      if waits then start = start + 1 end
      if is_left then left = left + 1 else inspected = inspected + 1 end
    end
  until closed or #page < scan or inspected >= scan or start >= reach
end

if #started > 0 then redis.call('PUBLISH', 'ncml:changes:state', table.concat(started, ' ')) end

for k = 3, #KEYS do -- wake another idle worker for the remaining jobs
  local wake = 'ncml:wake:' .. string.match(KEYS[k], 'ncml:(%a+):')
  if redis.call('LLEN', KEYS[k]) > 0 and redis.call('LLEN', wake) == 0 then redis.call('RPUSH', wake, 1) end
end
return {closed and '' or batch_key, left, claimed}
