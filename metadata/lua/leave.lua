-- Removes a worker's record if it is still that of this epoch.
-- KEYS: worker record, members stream
-- ARGV: epoch
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', '1000', '*', 'event', 'leave', 'worker', KEYS[1])
return 1
