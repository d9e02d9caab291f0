"""Analyses: functions of captured arrays, and sweeps of edits that measure cause."""
