"""The parts of `device_check.py`, each a process of its own: `python -m device.probe` and so on."""
