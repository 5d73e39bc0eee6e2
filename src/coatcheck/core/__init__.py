"""Every rule: values in, decision out. No I/O, no clock, no randomness."""
