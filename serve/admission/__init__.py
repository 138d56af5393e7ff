"""Who gets the next generator: one queue, one directory of sessions, and the ends of it in gateways and generators."""
