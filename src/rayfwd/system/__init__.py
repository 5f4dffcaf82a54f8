"""Services of the system: journal, service manager, Unix sockets, paths, descriptors."""
