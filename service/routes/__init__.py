"""The endpoints. A route parses the request, calls `JobService`, and responds; the work happens elsewhere."""
