-- Ends a job, once: only the caller that removes it from its place ends it.
-- KEYS the place (leases, or a queue), job, blob
-- ARGV id, token ('' for a job in a queue), 1 to act on a lapsed lease only, origin, ttl, status, event, blob,
--      event and error of a canceled job, field, value, ...
-- returns 0 if this call did not end the job, 1 if it did, and 2 if the job ended canceled instead, as was accepted
local id, token, origin = ARGV[1], ARGV[2], ARGV[4]
if token == '' then
  if not leave_queue(KEYS[1], id, KEYS[2]) then return 0 end
else
  local member = id .. ':' .. token
  local lease = redis.call('ZSCORE', KEYS[1], member)
  if not lease or (ARGV[3] == '1' and tonumber(lease) > clock()) then return 0 end
  redis.call('ZREM', KEYS[1], member)
  redis.call('ZREM', 'rq:wip:' .. origin, member)
end
if fields_of(KEYS[2], 'cancel')[1] then
  end_canceled(id, KEYS[2], origin, ARGV[5], ARGV[9], ARGV[10])
  return 2
end
-- the input is deleted, so that ended jobs are small; RQ requires the field
end_job(id, KEYS[2], origin, ARGV[5], ARGV[6], ARGV[7], {unpack(ARGV, 11)})
if ARGV[8] ~= '' then redis.call('SET', KEYS[3], ARGV[8], 'EX', ARGV[5]) end
return 1
