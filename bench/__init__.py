"""Side by side with plain TRL: same examples, same labels, same settings, one run. `python -m bench --help`."""
