"""Where units of work are done: in this process, or by Ray's workers."""
