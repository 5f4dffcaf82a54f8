"""What carries bytes, whatever brings them to the hub: lanes, sessions, listeners and relays."""
