#!/bin/sh
# Usage: setup_packages.sh demo|tests [PYTHON]
# Installs the Debian packages that the demo or the tests use, when root; else names what is missing
# and what is therefore not run. Says what it does before it does it. Does nothing where all is there.
set -u

for=$1
missing=""
need() { # command, Debian package, what it is for
    if command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]; then
        return
    fi
    missing="$missing $2"
    echo "missing: $1 (Debian package $2), for $3"
}

# Debian's python3 is without venv until its package is installed.
python=${2:-python3}
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing="$missing python3 python3-venv"
    echo "missing: Python 3.11 or newer with venv (Debian package python3-venv), for everything"
fi
need ip iproute2 "the network namespaces of the lab and the demo"
need unshare util-linux "the lab and the demo"
if [ "$for" = tests ]; then
    need cc gcc "the compiled wheel"
    if ! "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null; then
        missing="$missing python3-dev"
        echo "missing: Python.h (Debian package python3-dev), for the compiled wheel"
    fi
    need nft nftables "the firewalls of the lab"
    need conntrack conntrack "a firewall that forgets, in the lab"
    need sshd openssh-server "the lab's SSH servers"
    need ssh-keygen openssh-client "the lab's keys"
    need krb5kdc krb5-kdc "a Kerberos realm of a test's own"
    need kadmin.local krb5-admin-server "its principals"
    need kinit krb5-user "its tickets"
    need softhsm2-util softhsm2 "a token that holds a key"
    need groff groff-base "the man pages' check"
    need man man-db "the look for them"
    need zsh zsh "the look at its completion"
    need fish fish "the look at its completion"
    need busybox busybox "the login shell of small systems"
    need faketime faketime "a clock that is wrong, in the lab"
    need ps procps "the lab's look at processes"
    need jq jq "what the documents do with a status"
    need nc netcat-openbsd "what they try a port with"
    need slurmctld slurmctld "a job of Slurm, in the lab"
    need slurmd slurmd "its nodes"
    need sbatch slurm-client "its users"
    need munged munge "how they know each other"
    need chromium chromium "the look at the page in the browser"
    need systemd-nspawn systemd-container "the machines that are booted (tests/systemd)"
    need debootstrap debootstrap "their Debian"
fi

[ -n "$missing" ] || exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    echo "apt-get update"
    apt-get update -qq </dev/null || exit
    # What is there stays as it is, unless a package that is new requires another version of it.
    options="-y --no-install-recommends --no-upgrade"
    # shellcheck disable=SC2086  # lists of words
    plan=$(apt-get install $options --simulate $missing </dev/null) || { echo "$plan"; exit 1; }
    echo "$plan" | awk '$1 == "Inst" { if ($3 ~ /^\[/) upgraded = upgraded " " $2; else new = new " " $2 }
        END { print "apt-get installs:" new; if (upgraded) print "and upgrades, which these require:" upgraded }'
    # The tests start what they need by themselves: this machine gets no new sshd, and no Slurm.
    services=""
    for package in $missing; do
        case $package in
            openssh-server) services="$services ssh" ;;
            slurmctld | slurmd | munge | krb5-kdc | krb5-admin-server) services="$services $package" ;;
        esac
    done
    policy=/usr/sbin/policy-rc.d # Debian asks it before it starts a service
    if [ -n "$services" ] && [ ! -e $policy ]; then
        echo "their services are neither started now nor at the next boot:$services"
        trap 'rm -f $policy' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    # shellcheck disable=SC2086
    apt-get install -qq $options $missing </dev/null >/dev/null || exit
    # shellcheck disable=SC2086
    [ -z "$services" ] || systemctl disable --quiet $services 2>/dev/null
    exit 0
fi
echo "This is not root on Debian: install them by hand. Without them those parts are not run."
