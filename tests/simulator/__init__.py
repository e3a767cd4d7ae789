"""A deterministic simulator that runs the production machines on a virtual clock, bus, disk and store.

One seed decides everything: delays, losses, crashes, the workload. The same seed replays bit for bit.
"""
