"""Says what train.py knows: its help, the nearest keys, arguments that a class takes, errors in one sentence."""
