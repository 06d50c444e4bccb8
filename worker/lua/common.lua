-- Functions that the other scripts share: `worker.redis_keys.script` puts them in front of each.
-- A damaged record must not stop the script that meets it, because other jobs depend on that script.
local function clock()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1e6
end

local function append(id, entry, cap) -- adds to a job's events; a key of another type is replaced
  local events = 'ncml:events:' .. id
  local arguments = {'XADD', events}
  if cap then arguments = {'XADD', events, 'MAXLEN', cap} end
  arguments[#arguments + 1] = '*'
  arguments[#arguments + 1] = 'event'
  arguments[#arguments + 1] = entry
  local answer = redis.pcall(unpack(arguments))
  if type(answer) == 'table' and answer.err and string.find(answer.err, 'WRONGTYPE') then
    redis.call('DEL', events)
    redis.call(unpack(arguments))
  elseif type(answer) == 'table' and answer.err then
    error(answer.err)
  end
end

local function fields_of(job, ...) -- the fields of a record; all missing if the key has another type
  local answer = redis.pcall('HMGET', job, ...)
  return answer.err and {} or answer
end

local function count_bytes(queue, job, sign) -- of the jobs that wait in a lane
  local lane = string.match(queue, 'ncml:(%a+):')
  local size = tonumber(fields_of(job, 'bytes')[1])
  if not lane or not size then return end
  if redis.call('HINCRBY', 'ncml:waiting', lane, sign * size) <= 0 then redis.call('HDEL', 'ncml:waiting', lane) end
end

local function leave_queue(queue, id, job) -- whether it was there
  if redis.call('LREM', queue, 1, id) == 0 then return false end
  count_bytes(queue, job, -1)
  return true
end

local function announce(id, job, now) -- records that the end of a job is to be sent to its webhook, if it names one
  local fields = fields_of(job, 'webhook', 'webhook_id')
  local receiver = string.match(fields[1] or '', '^%a+://[^/]+')
  if not receiver or not string.match(fields[2] or '', '^[%w_]+$') then return end
  local record = 'ncml:delivery:' .. fields[2]
  redis.call('COPY', job, record, 'REPLACE')
  redis.call('HDEL', record, 'data', 'result', 'webhook_attempts', 'files', 'digests', 'fingerprint')
  redis.call('HSET', record, 'job', id)
  redis.call('EXPIRE', record, 4 * 86400) -- longer than it is tried
  redis.call('ZADD', 'ncml:deliveries:' .. receiver, now, fields[2])
  redis.call('SADD', 'ncml:receivers', receiver)
end

local function end_job(id, job, origin, ttl, status, event, fields) -- status: RQ's, after which its registry is named
  local now = clock()
  if redis.call('TYPE', job).ok ~= 'hash' then redis.call('DEL', job) end
  redis.call('HSET', job, 'status', status, 'ended', now, 'data', '', unpack(fields))
  redis.call('HDEL', job, 'cancel')
  redis.call('EXPIRE', job, ttl)
  append(id, event)
  redis.call('EXPIRE', 'ncml:events:' .. id, ttl)
  redis.call('PUBLISH', 'ncml:changes:state', id)
  announce(id, job, now)
  local list = 'rq:' .. status .. ':' .. origin
  redis.call('ZADD', list, now + ttl, id)
  redis.call('ZREMRANGEBYSCORE', list, 0, now)
end

local function end_canceled(id, job, origin, ttl, event, job_error)
  end_job(id, job, origin, ttl, 'canceled', event, {'outcome', 'canceled', 'error', job_error})
end

local function short_of_memory() -- a quarter is reserved for accepted jobs, and for what workers publish
  local memory = redis.call('INFO', 'memory')
  local limit = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  return limit > 0 and tonumber(string.match(memory, 'used_memory:(%d+)')) > 0.75 * limit
end

