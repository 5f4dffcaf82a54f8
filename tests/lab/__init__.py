"""The lab: machines with firewalls, sshd, the real Ray and rayfwd as installed from its wheel."""
