"""What the operator sees of a process: log lines now; metrics and traces are configured here as well."""
