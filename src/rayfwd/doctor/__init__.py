"""`rayfwd doctor`: looks at this machine, the way to the head, and the head.

`rows.py` and `judgements.py` are pure, `observe.py` reads this machine, `unit_checks.py` systemd's
units, `hub_probe.py` asks the hub on the head; `examination.py` goes through the checks of a role
(`head_checks.py`, `worker_checks.py` and `client_checks.py`, on `reachability.py` and
`common_checks.py`); `report.py` writes all of it down.
"""
