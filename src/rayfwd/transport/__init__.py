"""What carries bytes: SSH connections, lanes, sessions on the loop, listeners and relays."""
