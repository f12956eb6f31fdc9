"""Where the time goes: traces of chosen steps, snapshots of memory, and how much of a device's peak is used."""
