"""Brings other machines into the cluster from its head: `rayfwd add`, and `rayfwd remove`.

`hosts` says which, `ssh` reaches one, `sight` looks at it, `install` puts rayfwd (and Ray) there
from `wheels`, `there` is what that rayfwd then does on the machine itself, `here` what the head
keeps, and `adding` and `removing` have the order of it all. `places` says how many are at work at
once.
"""
