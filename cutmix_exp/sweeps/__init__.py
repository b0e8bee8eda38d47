"""Many runs: what is missing is trained, whatever happened before (see docs/sweeps.md).

There is no list of what was done: a run's identity names its directory, and the record in it says
whether it is complete. So a sweep that is killed at any moment is continued by its own command.
"""
