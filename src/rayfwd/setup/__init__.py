"""`rayfwd init` and `rayfwd uninstall`: what a machine needs for the service, made and taken away.

`plan` decides (pure), `steps` looks, makes and takes away, `manifest` keeps what was made.
"""
