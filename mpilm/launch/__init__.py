"""Process supervision: start, watchdog, stop requests, folder lock. Every failure ends with one message and one exit code."""
