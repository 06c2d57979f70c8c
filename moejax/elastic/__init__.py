"""Training that goes on when a process dies: a loop, a watchdog, snapshots, islands."""
