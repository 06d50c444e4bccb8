-- Adds a job, unless its id exists, its lane is full, or the server is short of memory.
-- KEYS job, events, wake, queue, then every queue of the lane
-- ARGV id, limit (-1: none), ttl, start_within_s, event, field, value, ...
if redis.call('EXISTS', KEYS[1]) == 1 then return 'duplicate' end
local depth = 0
for k = 5, #KEYS do depth = depth + redis.call('LLEN', KEYS[k]) end
if tonumber(ARGV[2]) >= 0 and depth >= tonumber(ARGV[2]) then return 'full' end
-- a quarter is reserved for accepted jobs: their leases and results, and what workers publish
local memory = redis.call('INFO', 'memory')
local most = tonumber(string.match(memory, 'maxmemory:(%d+)'))
if most > 0 and tonumber(string.match(memory, 'used_memory:(%d+)')) > 0.75 * most then return 'memory' end

local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
redis.call('HSET', KEYS[1], unpack(ARGV, 6))
redis.call('HSET', KEYS[1], 'submitted', now, 'start_by', now + ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('XADD', KEYS[2], '*', 'event', ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('SADD', 'rq:queues', KEYS[4])
redis.call('RPUSH', KEYS[4], ARGV[1])
if redis.call('LLEN', KEYS[3]) == 0 then redis.call('RPUSH', KEYS[3], 1) end
return 'queued'
