"""Processes of a run: start, lock, watchdog, preemption.

Exit codes, for the program that started the processes:

  0        done, or stopped on request with the current step saved
  75       start again: a peer was lost or late, or a step was stuck
  134, -6  start again: the runtime aborted because a peer was lost
  1, 2     do not start again: the command, the data or the code is at fault
"""

RETRY = 75  # EX_TEMPFAIL of sysexits.h
