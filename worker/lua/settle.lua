#!lua flags=allow-oom
-- Ends an attempt to deliver a webhook, if its lease still holds: the delivery is over, or due again.
-- KEYS sending and deliveries of the receiver, record of the delivery
-- ARGV id, token, 'waiting', 'delivered' or 'failed', pause until the next attempt
-- returns 1 if the lease held
if redis.call('ZREM', KEYS[1], ARGV[1] .. ':' .. ARGV[2]) == 0 then return 0 end
local fields = fields_of(KEYS[3], 'job', 'webhook_attempts')
if ARGV[3] == 'waiting' then
  redis.call('ZADD', KEYS[2], clock() + ARGV[4], ARGV[1])
else
  redis.call('DEL', KEYS[3])
end
local job = 'rq:job:' .. (fields[1] or '')
if fields[1] and fields_of(job, 'webhook_id')[1] == ARGV[1] then -- the job has not been deleted
  redis.call('HSET', job, 'webhook_state', ARGV[3], 'webhook_attempts', fields[2] or 0)
end
return 1
