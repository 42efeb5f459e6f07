"""Kernels: functions with several implementations behind one signature, each beside a plain reference."""
