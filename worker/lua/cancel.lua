#!lua flags=allow-oom
-- Cancels a job: ends it if it waits, or requests its worker to end it.
-- KEYS job; ARGV id, the time of its submission ('': any), ttl, event, error
-- returns 'missing', 'ended', 'canceled' or 'requested'
local id = ARGV[1]
local record = fields_of(KEYS[1], 'task', 'submitted', 'outcome', 'status', 'origin')
if not record[1] or (ARGV[2] ~= '' and tonumber(record[2]) ~= tonumber(ARGV[2])) then return 'missing' end
if record[3] or (record[4] ~= 'queued' and record[4] ~= 'started') then return 'ended' end
local origin = record[5] or ''
if record[4] == 'queued' and leave_queue('rq:queue:' .. origin, id, KEYS[1]) then
  end_canceled(id, KEYS[1], origin, ARGV[3], ARGV[4], ARGV[5])
  return 'canceled'
end
redis.call('HSET', KEYS[1], 'cancel', '1')
return 'requested'
