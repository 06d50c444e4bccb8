-- Deletes an ended job with everything that belongs to it.
-- KEYS job, events, blob, preview; ARGV the time of its submission ('': any)
-- returns 'missing', 'live' or 'forgotten'
local record = fields_of(KEYS[1], 'task', 'submitted', 'outcome', 'status')
if not record[1] or (ARGV[1] ~= '' and tonumber(record[2]) ~= tonumber(ARGV[1])) then return 'missing' end
if not record[3] and (record[4] == 'queued' or record[4] == 'started') then return 'live' end
redis.call('DEL', unpack(KEYS))
return 'forgotten'
