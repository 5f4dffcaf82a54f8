"""`rayfwd doctor`: looks at a machine before rayfwd is started there, or beside one that runs.

`rows.py` and `rules.py` are pure, `looks.py` reads this machine, `service.py` systemd's units,
`visit.py` asks the hub on the head; `examination.py` goes through the checks of a role (`head.py`,
`worker.py` and `client.py`, on `way.py` and `base.py`); `report.py` writes all of it down.
"""
