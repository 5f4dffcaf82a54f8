"""`python -m rayfwd` is `rayfwd`."""

from rayfwd.cli import main

if __name__ == "__main__":
    main()
