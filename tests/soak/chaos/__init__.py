"""Everything at once: processes of every role over a real server, killed, paused, cut off, filled up; an account.

`python -m tests.soak.chaos --seed N --minutes M` is the way in.
"""
