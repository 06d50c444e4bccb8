"""The endpoints. A route reads, asks the queue, and answers; nothing else happens in one."""
