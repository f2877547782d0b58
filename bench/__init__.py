"""Timings against rivals: `python -m bench OP`; see bench/_common.py for the rules every figure obeys."""
