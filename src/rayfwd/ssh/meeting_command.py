"""What the system's `ssh` runs at a meeting place: joins its session to the head's socket there.

`ssh -W` leads to ports only, so a command does it, by what stock systems have: Python, else Perl.
What passes through it is SSH to the head. A path without a slash is in the home directory, where
commands begin. Pure.
"""

from __future__ import annotations

import shlex

_PYTHON = (
    "import os,socket,sys,threading;"
    "s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1]);"
    "up=lambda:(any(s.sendall(d) for d in iter(lambda:os.read(0,65536),bytes())),s.shutdown(1));"
    "threading.Thread(target=up,daemon=True).start();"
    "any(os.write(1,d)<0 for d in iter(lambda:s.recv(65536),bytes()))"
)
_PERL = (
    "$s=IO::Socket::UNIX->new(Peer=>$ARGV[0]) or die qq($ARGV[0]: $!\\n);"
    "if($p=fork){while(sysread(STDIN,$b,65536)){$s->syswrite($b)};$s->shutdown(1);waitpid($p,0)}"
    "else{while(sysread($s,$b,65536)){syswrite(STDOUT,$b)};kill 15,getppid}"
)


def command(socket: str) -> str:
    """For the login shell there, whichever it is."""
    path = shlex.quote(socket)
    script = (
        f"command -v python3 >/dev/null 2>&1 && exec python3 -c {shlex.quote(_PYTHON)} {path}; "
        f"command -v perl >/dev/null 2>&1 && "
        f"exec perl -MIO::Socket::UNIX -e {shlex.quote(_PERL)} {path}; "
        "echo neither python3 nor perl is there >&2; exit 1"
    )
    return f"exec sh -c {shlex.quote(script)}"
