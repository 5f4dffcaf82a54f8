"""The canary: `script/canary_task.py` is run by the user's own Python.

`sender.py` starts, bounds and ends it. The script has a directory of its own, because
Python and Ray put that on the path for imports.
"""
