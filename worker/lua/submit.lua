-- Adds a job, unless its id exists, its lane is full, or the server is short of memory; or completes a held one.
-- A waiting job has no time to live: it ends by a transition, so a jump of the clock cannot erase it.
-- KEYS job, wake, queue, the queue of held jobs that it leaves, then every queue of the lane
-- ARGV id, limit of waiting jobs, and of their bytes (-1: none), lane, start_within_s, event ('': the job is held until
--      now), field, value, ...
local is_held = ARGV[6] == ''
if is_held and not redis.call('LPOS', KEYS[4], ARGV[1]) then return 'ended' end
if not is_held and redis.call('EXISTS', KEYS[1]) == 1 then return 'duplicate' end
local depth, bytes = 0, 0
for k = 5, #KEYS do depth = depth + redis.call('LLEN', KEYS[k]) end
if depth == 0 then
  redis.call('HDEL', 'ncml:waiting', ARGV[4]) -- nothing waits: reset bytes that were counted for damaged records
else
  bytes = tonumber(redis.call('HGET', 'ncml:waiting', ARGV[4])) or 0
end
if tonumber(ARGV[2]) >= 0 and depth >= tonumber(ARGV[2]) then return 'full' end
local size = 0
for i = 7, #ARGV, 2 do if ARGV[i] == 'data' then size = #ARGV[i + 1] end end
if tonumber(ARGV[3]) >= 0 and depth > 0 and bytes + size > tonumber(ARGV[3]) then return 'bytes' end
if short_of_memory() then return 'memory' end

local now = clock()
if is_held then
  leave_queue(KEYS[4], ARGV[1], KEYS[1])
else
  redis.call('HSET', KEYS[1], 'submitted', now)
  redis.call('DEL', 'ncml:events:' .. ARGV[1])
  append(ARGV[1], ARGV[6])
end
redis.call('HSET', KEYS[1], unpack(ARGV, 7))
redis.call('HSET', KEYS[1], 'start_by', now + ARGV[5], 'bytes', size)
redis.call('SADD', 'rq:queues', KEYS[3])
redis.call('RPUSH', KEYS[3], ARGV[1])
count_bytes(KEYS[3], KEYS[1], 1)
if KEYS[3] ~= KEYS[4] and redis.call('LLEN', KEYS[2]) == 0 then redis.call('RPUSH', KEYS[2], 1) end
return 'queued'
